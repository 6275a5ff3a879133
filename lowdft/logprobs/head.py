"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

At most [chunk, vocabulary] logits exist at a time. For a frozen head, which gets no gradient, they are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdft.errors import UserError

LARGEST_CHUNK, CPU_LOGITS, GPU_LOGITS = 1024, 100e6, 320e6  # tokens; bytes of float32 logits
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # what configurations call it


@dataclass(frozen=True)
class Head:
    """The output projection: logits = softcap(scale * (weight @ hidden + bias)).

    Some model families use `scale` (Cohere, Granite, HyperCLOVA X, Falcon-H1) or `softcap` (Gemma 2, RecurrentGemma,
    xLSTM).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, causal_lm: nn.Module) -> Head:
        """The head of a transformers causal language model.

        Raises:
            UserError: the head is not a plain linear layer (an adapter or quantization sits on it).
        """
        module, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
        if getattr(type(module), "forward", None) is not nn.Linear.forward:
            raise UserError(
                f"the output head is a {type(module).__name__}; lowdft computes log-probabilities from a plain linear "
                "head. Leave lm_head out of the adapter's target_modules and out of the quantization."
            )
        scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
        scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
        scale *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
        softcaps = (getattr(config, name, None) for name in SOFTCAPS)
        return cls(module.weight, module.bias, scale, next((cap for cap in softcaps if cap), None))

    @property
    def chunk(self) -> int:
        """How many tokens have their logits in memory at the same time, see `chunk_for`."""
        return chunk_for(len(self.weight_VD), self.weight_VD.device.type)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Float32 (or better) logits [S, V]."""
        logits_SV = nn.functional.linear(hidden_SD, self.weight_VD, self.bias_V)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_SV = logits_SV.mul_(self.scale)
        if self.softcap is not None:
            logits_SV = logits_SV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_SV


def chunk_for(vocabulary: int, device: str) -> int:
    """How many tokens have their logits in memory at once: a power of two; as float32 they fit 100 MB (320 on a GPU).

    Peak memory is two to three times that. On a CPU small chunks are a little faster (SmolLM2 in bfloat16: 0.46 s with
    128 tokens, 0.58 s with 1024; one run on a busy machine).
    """
    most = int((CPU_LOGITS if device == "cpu" else GPU_LOGITS) // (4 * vocabulary))
    return min(LARGEST_CHUNK, 1 << max(0, most.bit_length() - 1))


def token_logps(hidden_SD: Tensor, head: Head, target_S: Tensor, chunk_size: int | None = None) -> Tensor:
    """log P(target | hidden) for S tokens: float [S], differentiable in the hidden states and a trainable head."""
    chunk_size = chunk_size or head.chunk
    if not torch.is_grad_enabled():
        hidden_SD = hidden_SD.detach()
    return _TokenLogps.apply(hidden_SD, head.weight_VD, head.bias_V, target_S, head.scale, head.softcap, chunk_size)


@torch.no_grad()
def greedy_tokens(hidden_SD: Tensor, head: Head, chunk_size: int | None = None) -> Tensor:
    """The likeliest token after every hidden state, [S]."""
    return torch.cat([head.logits(hidden).argmax(1) for hidden in hidden_SD.split(chunk_size or head.chunk)])


@torch.no_grad()
def proposal_logps(
    hidden_SD: Tensor,
    head: Head,
    target_S: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    chunk_size: int | None = None,
) -> Tensor:
    """log-density [S] of a sampler that applies temperature, then top-k, then top-p, at tokens that it drew.

    A drawn token was among those kept, so it counts as kept: near-ties at the edge of top-k and top-p fall on either
    side with rounding, which differs between the batches of sampling and of scoring.
    """
    out, chunk_size = [], chunk_size or head.chunk
    for hidden, target in zip(hidden_SD.split(chunk_size), target_S.split(chunk_size), strict=True):
        scaled, place_S1 = head.logits(hidden) / temperature, target[:, None]
        drawn_S1 = scaled.gather(1, place_S1)
        kept = truncate(scaled, top_p, top_k).scatter(1, place_S1, drawn_S1)
        out.append(drawn_S1[:, 0] - kept.logsumexp(1))
    return torch.cat(out)


def truncate(logits_SV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits with -inf wherever top-k (0: off), then top-p (1: off) cut a token off; the usual order of samplers."""
    if 0 < top_k < logits_SV.shape[1]:
        kth = logits_SV.topk(top_k, dim=1).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits_SV.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits_SV = logits_SV.masked_fill(cut, float("-inf"))
    return logits_SV


class _TokenLogps(torch.autograd.Function):
    """log-softmax at the targets.

    With a frozen head the derivative of each log-probability by its hidden state, scale * (onehot - softmax) @ weight,
    is taken while the logits are at hand: no logits are computed twice. A trainable head recomputes them to go back.
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, scale, softcap, chunk_size):
        """Log-probabilities [S]; see `token_logps`."""
        head = Head(weight_VD, bias_V, scale, softcap)
        frozen = not any(ctx.needs_input_grad[1:3])
        slope_SD = torch.empty_like(hidden_SD) if frozen and ctx.needs_input_grad[0] else None
        logps = []
        for start in range(0, len(target_S), chunk_size):
            piece = slice(start, start + chunk_size)
            logits = head.logits(hidden_SD[piece])
            at_target = logits.gather(1, target_S[piece, None])[:, 0]
            if slope_SD is None:
                lse, _ = _exponentials(logits)
            else:
                lse, slope = _logits_slope(logits, target_S[piece], head)
                torch.mm(slope.to(hidden_SD.dtype), weight_VD, out=slope_SD[piece])
            logps.append(at_target - lse)
        saved = (slope_SD,) if frozen else (hidden_SD, weight_VD, bias_V, target_S)
        ctx.save_for_backward(*saved)
        ctx.frozen, ctx.scale, ctx.softcap, ctx.chunk_size = frozen, scale, softcap, chunk_size
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_S):
        """Gradients of the hidden states, and of weight and bias where the head is trained."""
        if ctx.frozen:
            (slope_SD,) = ctx.saved_tensors
            return slope_SD * grad_S[:, None].to(slope_SD.dtype), None, None, None, None, None, None
        hidden_SD, weight_VD, bias_V, target_S = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        grad_hidden = torch.empty_like(hidden_SD)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        for start in range(0, len(target_S), ctx.chunk_size):
            piece = slice(start, start + ctx.chunk_size)
            _, slope = _logits_slope(head.logits(hidden_SD[piece]), target_S[piece], head)
            grad_logits = slope.mul_(grad_S[piece, None]).to(hidden_SD.dtype)
            grad_hidden[piece] = grad_logits @ weight_VD
            grad_weight += grad_logits.T @ hidden_SD[piece]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight.to(weight_VD.dtype), grad_bias, None, None, None, None


def _exponentials(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum-exp [S], and sums [S, 1] of exp(logits - largest), which overwrites `logits`."""
    top_S1 = logits_SV.amax(1, keepdim=True)
    total_S1 = logits_SV.sub_(top_S1).exp_().sum(1, keepdim=True)
    return (top_S1 + total_S1.log())[:, 0], total_S1


def _logits_slope(logits_SV: Tensor, target_S: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """log-sum-exp [S], and d log P(target) / d(weight @ hidden) = scale * softcap' * (onehot - softmax) [S, V].

    The latter overwrites `logits`.
    """
    bend = None if head.softcap is None else 1 - (logits_SV / head.softcap).square()
    lse_S, total_S1 = _exponentials(logits_SV)
    slope = logits_SV.mul_(-1 / total_S1)
    slope[torch.arange(len(target_S), device=target_S.device), target_S] += 1
    if bend is not None:
        slope *= bend
    return lse_S, slope if head.scale == 1.0 else slope.mul_(head.scale)
