"""Sections on what comes out: causality, codes, attention, precision, neighbours, ways to one gradient."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from gpu_sections.common import Setting, require_cuda, sdpa_alone
from lowdft.logprobs import packed_attention, score, varlen
from lowdft.logprobs.attention import Pieces, attend


def causality(setting: Setting) -> dict:
    """Where is `varlen_attn` causal: at the end of queries and keys (bottom right) or at their beginning (top left)?"""
    require_cuda(setting, "varlen_attn")
    if varlen.varlen_attn is None:
        return {"passed": False, "why": f"torch {torch.__version__} has no varlen_attn: SDPA is used"}
    q, k, v = (torch.randn(n, 4, 64, device=setting.device, dtype=torch.bfloat16) for n in (30, 70, 70))
    ends = [torch.tensor([0, n], device=setting.device, dtype=torch.int32) for n in (30, 70)]
    out = varlen.varlen_attn(q, k, v, *ends, 30, 70, window_size=(-1, 0)).transpose(0, 1).double()
    errors = {}
    for name, first in (("bottom right", 40), ("top left", 0)):
        seen = torch.ones(30, 70, dtype=torch.bool, device=setting.device).tril(first)
        wanted = nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1).double() for x in (q, k, v)), seen)
        errors[name] = ((out - wanted).norm() / wanted.norm()).item()
    trials = {f"{dtype} {size}": varlen.what_is_wrong(setting.device, dtype, size)
              for dtype in varlen.HALF for size in (64, 128, 256)}  # fmt: skip
    return {"passed": not any(trials.values()), "aligned at the": min(errors, key=errors.get), "errors": errors,
            "trials": {name: wrong or "right" for name, wrong in trials.items()}}  # fmt: skip


def nf4_codes(setting: Setting) -> dict:
    """NF4 codes are the same on CPU and GPU."""
    from bitsandbytes.functional import quantize_4bit

    require_cuda(setting, "the same codes")
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    (here, _), (there, _) = (quantize_4bit(weight.to(d), quant_type="nf4") for d in ("cpu", setting.device))
    different = (here.flatten() != there.flatten().cpu()).sum().item()
    return {"passed": different == 0, "different bytes": different, "of": here.numel()}


def attention(setting: Setting) -> dict:
    """Attention, forward and backward, against float64, by backend, grouping and window."""
    backends = {"as it is": None, "math": SDPBackend.MATH}
    if setting.device.type == "cuda":
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    errors = {}
    for name, backend in backends.items():
        for each in (1, 4, 7):
            for window in (None, 16):
                try:
                    errors[f"{name} {each} {window}"] = _attention_error(setting, backend, each, window)
                except RuntimeError as error:
                    errors[f"{name} {each} {window}"] = f"none: {str(error)[:60]}"
    numbers = [e for name, e in errors.items() if name.startswith("as it is") and isinstance(e, float)]
    most = 2e-2 if setting.dtype == torch.bfloat16 else 1e-5
    by_varlen = varlen.varlen_is_right(setting.device, setting.dtype, 64)
    return {"passed": len(numbers) == 6 and max(numbers) < most, "as it is": "varlen" if by_varlen else "SDPA",
            "largest relative error": errors}  # fmt: skip


class _Layer:
    config = type("Config", (), {"sliding_window": None})


def _attention_error(setting: Setting, backend, each: int, window: int | None) -> float:
    """The largest relative error of output and gradients of one packed row."""
    shared, size = 2, 64
    prompts, completions = [(0, 0, 0, 40), (40, 0, 40, 25)], [(0, 40, 65, 30), (0, 40, 95, 7), (40, 25, 102, 90)]
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(1, heads, 192, size, generator=generator, dtype=torch.float64)  # noqa: E731
    given, pull = [draw(shared * each), draw(shared), draw(shared)], draw(shared * each).transpose(1, 2)

    def run(device, dtype, around):
        x = [t.to(device, dtype).requires_grad_() for t in given]
        with around:
            out, _ = attend(_Layer, *x, None, Pieces(prompts, completions, 192, device), scaling=size**-0.5,
                            sliding_window=window)  # fmt: skip
            found = [out, *torch.autograd.grad((out * pull.to(out)).sum(), x)]
        return [f.double().cpu() for f in found]

    wanted = run("cpu", torch.float64, contextlib.nullcontext())
    with contextlib.ExitStack() as around:
        if backend is not None:
            around.enter_context(sdpa_alone())
            around.enter_context(sdpa_kernel(backend))
        found = run(setting.device, setting.dtype, contextlib.nullcontext())
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))


def two_layers(setting: Setting) -> dict:
    """A 2-layer model: CPU float32 against this device, packed against padded, nats per token."""
    torch.manual_seed(0)
    config = setting.config(2)
    if not setting.tiny:
        config.hidden_size, config.intermediate_size, config.head_dim = 1024, 2816, 32
    model = LlamaForCausalLM(config).eval()
    groups = setting.groups(setting.tokens[0])
    with torch.no_grad():
        wanted = score(model, groups).per_token_logps_S
        model.to(setting.device)
        found = {"float32": score(model, groups).per_token_logps_S.cpu()}
        found["float32, padded"] = score(model, groups, "padded").per_token_logps_S.cpu()
        found["bfloat16"] = score(model.bfloat16(), groups).per_token_logps_S.float().cpu()
    errors = {name: (values - wanted).square().mean().sqrt().item() for name, values in found.items()}
    return {"passed": errors["float32"] < 1e-3 and errors["bfloat16"] < 0.13, "root mean square": errors}


def neighbours(setting: Setting) -> dict:
    """One group alone and among others: equal bits, nats, and the spread of omega = exp(difference)."""
    model, found = setting.policy().eval(), {}
    for name, around in {"as it is": contextlib.nullcontext, "SDPA": sdpa_alone}.items():
        alone = None
        with torch.no_grad(), around():
            for tokens in setting.tokens:
                out = score(model, setting.groups(tokens)).logps_C[:3]
                again = score(model, setting.groups(tokens)).logps_C[:3]
                alone = out if alone is None else alone
                apart = (out - alone).abs().max().item()
                found[f"{name} {tokens}"] = {"same bits twice": torch.equal(out, again), "nats": apart,
                                             "omega": torch.tensor(apart).exp().item()}  # fmt: skip
    twice = all(entry["same bits twice"] for entry in found.values())
    return {"passed": twice, "attention by itself, same bits": _attention_bits(setting)} | found


def _attention_bits(setting: Setting) -> dict[str, bool]:
    """Has a prompt with its completion the same attention, bit for bit, alone and before another group?"""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, heads, 272, 64, generator=generator).to(setting.device, setting.dtype) for heads in (8, 2, 2)]
    mine, other = ([(0, 0, 0, 40)], [(0, 40, 40, 30)]), ([(70, 0, 70, 99)], [(70, 99, 169, 90)])
    found = {}
    for name, around in {"as it is": contextlib.nullcontext, "SDPA": sdpa_alone}.items():
        with torch.no_grad(), around():
            alone, _ = attend(_Layer, *(t[:, :, :80] for t in x), None, Pieces(*mine, 80, setting.device))
            both = Pieces(mine[0] + other[0], mine[1] + other[1], 272, setting.device)
            among, _ = attend(_Layer, *x, None, both)
        found[name] = torch.equal(alone[:, :70], among[:, :70])
    return found


def ways_to_a_gradient(setting: Setting) -> dict:
    """Checkpointing, offloading, and two passes for one: cosine with the plain gradient."""
    model, groups = setting.policy(), setting.groups(setting.tokens[1])
    plain = setting.gradient(model, setting.passes(), groups)
    found = {"again": setting.gradient(model, setting.passes(), groups)}
    found["pieces"] = setting.gradient(model, setting.passes(setting.tokens[0] * 5 // 8), groups)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    try:
        found["checkpointed"] = setting.gradient(model, setting.passes(), groups)
        with torch.autograd.graph.save_on_cpu(pin_memory=setting.device.type == "cuda"), packed_attention(base):
            found["offloaded"] = setting.gradient(model, setting.passes(), groups)
    finally:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    cosines = {name: nn.functional.cosine_similarity(g, plain, dim=0).item() for name, g in found.items()}
    bits = torch.equal(found["again"], plain)
    return {"passed": min(cosines.values()) > 0.99, "same bits twice": bits, "cosine": cosines}
