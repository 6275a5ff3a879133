"""Attention over few keys in bfloat16 on a CPU: products in bfloat16, scores and softmax in float32.

torch's flash kernel for CPUs takes 1.2 to 7 times as long on such short pieces, with about the same error (0.2 to 0.3%
of output and gradients in float64). With 512 keys the two are level, and in float32 they always are. The softmax is
computed again in the backward pass, so no more is kept than by the flash kernel.

Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST_KEYS = 256


def takes_short(q: Tensor, num_keys: int) -> bool:
    """Whether `short_attention` is the faster way for these queries."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and num_keys <= MOST_KEYS and _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(scale * q k^T + mask) v for q [N, J, Q, E], k and v [N, J, K, E], mask [N, 1, Q, K]."""
    return _ShortAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


class _ShortAttention(torch.autograd.Function):
    """Dao et al. 2022 (arXiv 2205.14135), appendix B.2, without tiles."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        """See `short_attention`."""
        ctx.shape, ctx.scale = q.shape, scale
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, mask)
        return (_weights(q, k, mask, scale).to(v.dtype) @ v).view(ctx.shape)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of q, k and v."""
        q, k, v, mask = ctx.saved_tensors
        grad, weights = grad.flatten(0, 1), _weights(q, k, mask, ctx.scale)
        grad_v = weights.to(v.dtype).transpose(1, 2) @ grad
        grad_scores = (grad @ v.transpose(1, 2)).to(weights.dtype)
        grad_scores.sub_((grad_scores * weights).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        grad_scores = grad_scores.to(q.dtype)
        found = grad_scores @ k, grad_scores.transpose(1, 2) @ q, grad_v
        return *(x.unflatten(0, ctx.shape[:2]) for x in found), None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The softmax in float32 (float64 for float64 queries), [N * J, Q, K]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = mask.to(wide).expand(-1, len(q) // len(mask), -1, -1).flatten(0, 1).contiguous()
    return scores.baddbmm_(q.to(wide), k.to(wide).transpose(1, 2), alpha=scale).softmax(-1)
