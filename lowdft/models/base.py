"""The base and its tokenizer: finding, loading and identifying them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from lowdft.compat import without_deepspeed
from lowdft.config.sections import ModelSection
from lowdft.data.turns import Turns
from lowdft.distributed.sharding import is_fsdp
from lowdft.errors import UserError
from lowdft.files.packages import SCHEME, package_file
from lowdft.models.gguf import unpack_gguf
from lowdft.models.safeguards import guard_four_bit


@dataclass(frozen=True)
class Source:
    """Where a base is loaded from (`path`: folder or Hub name), and what identifies its weights (`identity`)."""

    path: str
    revision: str | None
    identity: str
    is_local: bool


def locate(section: ModelSection) -> Source:
    """Finds a base without loading it: a folder, a .gguf file (unpacked once into the cache) or a Hub name.

    Raises:
        UserError: there is no such model, or no network to ask for it.
    """
    name = section.name_or_path
    if name.startswith(SCHEME):
        name = str(package_file(name))
    if name.endswith(".gguf"):
        folder = unpack_gguf(Path(name))
        return Source(str(folder), None, f"gguf sha256 {folder.name}", True)
    if Path(name).is_dir():
        return Source(name, None, f"folder {_folder_digest(Path(name))}", True)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"model.name_or_path is {name!r}: there is no such folder, and it is not a Hub name (owner/name)."
        )
    config = _hub_config(section)
    commit = getattr(config, "_commit_hash", None) or section.revision
    return Source(name, commit, f"{name}@{commit}", False)


def load_tokenizer(source: Source, section: ModelSection):
    """The base's tokenizer, with the recipe's chat template if it has one.

    If there is no pad token, the end token is used (no token is ever added to a vocabulary).
    """
    tokenizer = AutoTokenizer.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=section.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if section.chat_template:
        tokenizer.chat_template = section.chat_template
    return tokenizer


def load_base(source: Source, section: ModelSection, device: torch.device | None = None):
    """The base on its device: NF4 with double quantization, or dense in `section.dtype`.

    With `section.dequantize` the dequantized NF4 weights are kept in plain linear layers. Embedding and head stay in
    `section.dtype`; nothing is converted to float32. Under ZeRO-3 each rank loads only its part, except inside
    `whole_weights`.

    Raises:
        UserError: a 4-bit base under ZeRO-3.
    """
    set_up_cuda()
    in_parts = is_deepspeed_zero3_enabled()
    if in_parts and section.load_in_4bit:
        raise UserError("model.load_in_4bit with ZeRO-3 is not supported; use --launch fsdp (FSDP-QLoRA), zero2 or ddp")
    if device is None:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = getattr(torch, section.dtype)
    quantization = {}
    if section.load_in_4bit:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if is_fsdp() else torch.uint8,  # FSDP shards floats only
        )
    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        revision=source.revision,
        dtype=dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        device_map=None if in_parts else {"": device},
        **quantization,
    )
    if section.dequantize:
        model = model.dequantize(dtype)
    guard_four_bit(model)
    return model


def set_up_cuda() -> None:
    """On a GPU: no cuDNN attention, and bfloat16 products that add up in float32.

    cuDNN makes a plan for every new shape (some 30 ms), has had NaN gradients with masks, and breaks checkpointing
    (pytorch#196678, NeMo-RL#1676).
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def release_memory() -> None:
    """Frees the memory of models that are no longer used; 4-bit models are in reference cycles until a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """A context in which models are whole and generate without waiting for other ranks, even under ZeRO-3."""
    with without_deepspeed():
        yield


def context_length(source: Source, section: ModelSection) -> int | None:
    """The base's context length, if its configuration has it."""
    return getattr(configuration(source, section).get_text_config(), "max_position_embeddings", None)


def configuration(source: Source, section: ModelSection):
    """The base's configuration, without its weights."""
    return AutoConfig.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=section.trust_remote_code
    )


def public_name(source: Source, section: ModelSection) -> str:
    """The base's name for a model card: a Hub name, or the name of a local folder or file, never a path."""
    if section.hub_id:
        return section.hub_id
    return Path(section.name_or_path).name if source.is_local else section.name_or_path


def made_from(source: Source, section: ModelSection, tokenizer) -> dict:
    """What determines this base's numbers, for manifests: weights, quantization, dtype, tokenizer and template."""
    tokens = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode() if tokenizer.is_fast else b"slow")
    tokens.update((tokenizer.chat_template or "").encode())
    settings = {k: v for k, v in asdict(section).items() if k in ("load_in_4bit", "dtype", "attn_implementation")}
    return {"base": source.identity, **settings, "tokenizer": tokens.hexdigest()[:16]}


def _hub_config(section: ModelSection):
    name = section.name_or_path
    try:
        return AutoConfig.from_pretrained(name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        at = f" at revision {section.revision}" if section.revision else ""
        raise UserError(
            f"model.name_or_path is {name!r}{at}: it is not in the local cache ({constants.HF_HUB_CACHE}) and could "
            f"not be fetched ({str(error).splitlines()[0][:160]}). Check the spelling and the revision; with no "
            "network, download it elsewhere (`hf download`) and give its folder; for a gated model log in with "
            "`hf auth login`."
        ) from error


def _folder_digest(folder: Path) -> str:
    """A hash of a local folder's weights: configuration, tensor headers, and both ends of every weight file."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        if not path.is_file():
            raise UserError(f"{folder}: this folder has no config.json, so it is not a transformers model")
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def generation_end_ids(model) -> list[int]:
    """`eos_token_id` of the generation settings, for a loaded model or, without its weights, for a `Source`.

    As in transformers, the model's configuration is used if there are no generation settings.
    """
    if isinstance(model, Source):
        try:
            found = GenerationConfig.from_pretrained(model.path, revision=model.revision).eos_token_id
        except OSError:
            config = PretrainedConfig.get_config_dict(model.path, revision=model.revision)[0]
            found = config.get("eos_token_id") or config.get("text_config", {}).get("eos_token_id")
    else:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [token for token in (found if isinstance(found, list) else [found]) if token is not None]


def end_ids(tokenizer, model) -> list[int]:
    """All tokens that end an answer, from the tokenizer, the generation settings and the chat template.

    Args:
        model: a loaded model, or a `Source`.
    """
    return Turns(tokenizer, generation_end_ids(model)).end_ids


def base_digest(model: nn.Module) -> str | None:
    """Identifies a frozen base by some input embeddings, in 4 bit or not; None if they are trained or sharded."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None or weight.requires_grad or weight.dim() != 2 or not weight.numel():
        return None
    return xxhash.xxh3_64_hexdigest(weight[:64].detach().float().cpu().contiguous().numpy())
