"""Bases in GGUF files, dequantized once into the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lowdft.errors import UserError
from lowdft.files import locked, read_json, replacing, write_json
from lowdft.text import printable

MADE = "lowdft.json"  # the sizes of a cached folder's files, written last


def unpack_gguf(path: Path) -> Path:
    """A transformers folder with a GGUF file's weights, dequantized to bfloat16; made once and kept in the cache."""
    if not path.is_file():
        raise UserError(f"model.name_or_path is {str(path)!r}: there is no such file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    folder = Path(constants.HF_HOME) / "lowdft" / "gguf" / digest.hexdigest()[:16]
    if _is_whole(folder):
        return folder
    with locked(folder.with_name(folder.name + ".unpacking"), wait=True):
        if not _is_whole(folder):
            _unpack(path, folder)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    print(f"unpacking {printable(path.name)} (once) …", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: transformers cannot read this GGUF file ({str(error)[:160]})") from error
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / MADE, {p.name: p.stat().st_size for p in temporary.iterdir()})


def _is_whole(folder: Path) -> bool:
    """Whether this folder was finished and its files still have their sizes."""
    if not (folder / MADE).is_file():
        return False
    try:
        sizes = read_json(folder / MADE)
    except UserError:
        return False
    files = {name: folder / name for name in sizes}
    return all(path.is_file() and path.stat().st_size == sizes[name] for name, path in files.items())
