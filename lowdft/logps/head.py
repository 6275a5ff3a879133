"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

Never more than [chunk, vocabulary] logits exist; the backward pass computes them again. A frozen head gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """The output projection: logits = softcap(scale * (weight @ hidden + bias)).

    `scale` and `softcap` are those of families that bend their logits (Cohere, Granite; Gemma 2).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, causal_lm: nn.Module) -> Head:
        """The head of a transformers causal language model.

        Raises:
            ValueError: the head is not a plain linear layer (an adapter or quantization sits on it).
        """
        module, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
        if type(module) is not nn.Linear:
            raise ValueError(
                f"the output head is a {type(module).__name__}; lowdft computes log-probabilities from a plain linear "
                "head. Leave lm_head out of the adapter's target_modules and out of the quantization."
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Float32 (or better) logits [S, V]."""
        logits_SV = nn.functional.linear(hidden_SD, self.weight_VD, self.bias_V)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_SV = logits_SV.mul_(self.scale)
        if self.softcap is not None:
            logits_SV = logits_SV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_SV


def token_logps(hidden_SD: Tensor, head: Head, target_S: Tensor, chunk_size: int = 256) -> Tensor:
    """log P(target | hidden) for S tokens: float [S], differentiable in the hidden states and a trainable head."""
    return _TokenLogps.apply(hidden_SD, head.weight_VD, head.bias_V, target_S, head.scale, head.softcap, chunk_size)


@torch.no_grad()
def proposal_logps(
    hidden_SD: Tensor, head: Head, target_S: Tensor, temperature: float, top_p: float, top_k: int, chunk_size: int = 256
) -> Tensor:
    """log-density [S] of a sampler that applies temperature, then top-k, then top-p. -inf for a token it cut off."""
    out = []
    for hidden, target in zip(hidden_SD.split(chunk_size), target_S.split(chunk_size), strict=True):
        logits = truncate(head.logits(hidden) / temperature, top_p, top_k)
        out.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
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
    """log-softmax at the targets; saves hidden states and one log-sum-exp a token, recomputes logits to go back."""

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, scale, softcap, chunk_size):
        head = Head(weight_VD, bias_V, scale, softcap)
        logps, lses = [], []
        for hidden, target in zip(hidden_SD.split(chunk_size), target_S.split(chunk_size), strict=True):
            logits = head.logits(hidden)
            lse = logits.logsumexp(1)
            logps.append(logits.gather(1, target[:, None])[:, 0] - lse)
            lses.append(lse)
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, target_S, torch.cat(lses))
        ctx.scale, ctx.softcap, ctx.chunk_size = scale, softcap, chunk_size
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_S):
        hidden_SD, weight_VD, bias_V, target_S, lse_S = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        grad_hidden = torch.empty_like(hidden_SD)
        grad_weight = (
            torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
            if ctx.needs_input_grad[1]
            else None
        )
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(target_S), ctx.chunk_size):
            piece = slice(start, start + ctx.chunk_size)
            hidden, target, grad = hidden_SD[piece], target_S[piece], grad_S[piece]
            logits = head.logits(hidden)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
            grad_logits = logits.sub_(lse_S[piece, None]).exp_().mul_(-grad[:, None])
            grad_logits[torch.arange(len(target), device=target.device), target] += grad
            if slope is not None:
                grad_logits *= slope
            if ctx.scale != 1.0:
                grad_logits *= ctx.scale
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[piece] = grad_logits @ weight_VD
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
