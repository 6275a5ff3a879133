"""Sections on time: the machine's own rates, one pass and its parts, and what might make it faster."""

from __future__ import annotations

import contextlib
import statistics
from types import SimpleNamespace

import torch
from torch import nn

from gpu_sections.common import Setting, sdpa_alone
from lowdft import DFTConfig
from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.models.fused_lora import fused_lora
from lowdft.models.memory import estimate


def ceilings(setting: Setting) -> dict:
    """Versions, and the machine's rates of products and copies."""
    import bitsandbytes
    import peft
    import transformers

    n = 256 if setting.tiny else 8192
    a, b = (torch.randn(n, n, dtype=setting.dtype, device=setting.device) for _ in range(2))
    product = min(setting.seconds(lambda: a @ b, 6)[1:])
    copy = min(setting.seconds(lambda: a.clone(), 6)[1:])
    setting.rate = 2 * n**3 / product
    modules = (torch, transformers, peft, bitsandbytes)
    versions = {m.__name__: m.__version__ for m in modules}
    return {"device": setting.name, "Tflop/s": setting.rate / 1e12, "copies GB/s": 2 * a.nbytes / copy / 1e9} | versions


def profile(setting: Setting) -> dict:
    """Where the time of one pass goes: ten largest operators, ms."""
    model, groups = setting.policy(), setting.groups(setting.tokens[-1])
    on_gpu = setting.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else [torch.profiler.ProfilerActivity.CPU]
    _step(setting, model, groups)
    with torch.profiler.profile(activities=kinds) as found:
        _step(setting, model, groups)
        if on_gpu:
            torch.cuda.synchronize()
    time_of = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total  # noqa: E731
    events = sorted(found.key_averages(), key=time_of, reverse=True)[:10]
    return {event.key[:60]: round(time_of(event) / 1000, 2) for event in events}


def fresh_shapes(setting: Setting) -> dict:
    """Seconds of passes whose shapes are new, against the same one again."""
    model = setting.policy()
    base = setting.groups(setting.tokens[1])
    for groups in (base, base):
        _step(setting, model, groups)
    again = statistics.median(setting.seconds(lambda: _step(setting, model, base), 3))
    fresh = []
    for cut in range(1, 5):  # every completion shorter by some tokens
        groups = [type(g)(g.prompt_ids, [c[: len(c) - cut] for c in g.completions]) for g in base]
        fresh += setting.seconds(lambda groups=groups: _step(setting, model, groups), 1)
    return {"again": again, "fresh": statistics.median(fresh), "ratio": statistics.median(fresh) / again}


def throughput(setting: Setting) -> dict:
    """Tokens/s, share of the product rate (useful FLOP), and memory beside the plan, by tokens and checkpoints."""
    model, table = setting.policy(), {}
    base, on_gpu = model.get_base_model(), setting.device.type == "cuda"
    weights = sum(m.in_features * m.out_features for m in base.modules() if hasattr(m, "in_features"))
    for checkpointing in (True, False):
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        else:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
        for tokens in setting.tokens:
            groups = setting.groups(tokens)
            count = sum(g.num_tokens for g in groups)
            try:
                _step(setting, model, groups)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                seconds = statistics.median(setting.seconds(lambda groups=groups: _step(setting, model, groups), 2))
            except torch.OutOfMemoryError:
                table[f"{tokens} {checkpointing}"] = "out of memory"
                continue
            entry = {"tokens/s": count / seconds}
            if setting.rate:
                entry["share"] = 4 * weights * count / seconds / setting.rate
            if on_gpu:
                allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                planned = _planned(setting, checkpointing, groups)
                entry |= {"GB": allocated / 1e9, "reserved": reserved / 1e9, "planned": planned / 1e9,
                          "planned / allocated": planned / allocated}  # fmt: skip
            table[f"{tokens} {'checkpointed' if checkpointing else 'plain'}"] = entry
    ratios = [e["planned / allocated"] for e in table.values() if isinstance(e, dict) and "planned / allocated" in e]
    return {"passed": all(0.85 < r < 1.15 for r in ratios) if ratios else None, "by tokens": table}


def _planned(setting: Setting, checkpointing: bool, groups) -> float:
    section = ModelSection(name_or_path="-", load_in_4bit=True, dtype=str(setting.dtype).removeprefix("torch."))
    args = DFTConfig(output_dir="/tmp/lowdft-gpu", gradient_checkpointing=checkpointing)
    memory = estimate(setting.config(), section, AdapterSection(), args, groups, on_gpu=True)
    return memory.total - memory.parts["optimizer"]


def candidates(setting: Setting) -> dict:
    """Seconds of a pass by attention, with and without the fused LoRA, by head chunk, and with a dequantized base."""
    model, groups = setting.policy(), setting.groups(setting.tokens[1])
    ways = {"as it is": {}, "SDPA": {"around": sdpa_alone}, "peft's LoRA": {"fused": False},
            "head chunk 256": {"chunk": 256}, "head chunk 4096": {"chunk": 4096}}  # fmt: skip
    found = {name: [] for name in ways}
    for _ in range(4):  # alternating; the first warms up
        for name, how in ways.items():
            found[name] += setting.seconds(lambda how=how: _step(setting, model, groups, **how), 1)
    result = {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
    dense = 2 * sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    free = torch.cuda.mem_get_info()[0] if setting.device.type == "cuda" else 1e9
    if dense < 0.6 * free:
        with _dequantized(model, setting):
            _step(setting, model, groups)
            result["dequantized once"] = statistics.median(
                setting.seconds(lambda: _step(setting, model, groups, fused=False), 3)
            )
    return result


@contextlib.contextmanager
def _dequantized(model, setting: Setting):
    """4-bit layers compute with dense weights that are kept."""
    from bitsandbytes.functional import dequantize_4bit

    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m.weight, "quant_state")]
    for layer in layers:
        dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(setting.dtype)
        layer.forward = lambda x, dense=dense: nn.functional.linear(x.to(dense.dtype), dense)
    try:
        yield SimpleNamespace(layers=len(layers))
    finally:
        for layer in layers:
            del layer.forward


def _step(
    setting: Setting, model, groups, fused: bool = True, chunk: int | None = None, around=contextlib.nullcontext
) -> None:
    with fused_lora(model) if fused else contextlib.nullcontext(), around():
        setting.passes(chunk=chunk).backpropagate(
            model, groups, lambda numbers, logps: logps.sum(), lambda loss, last: loss.backward()
        )
