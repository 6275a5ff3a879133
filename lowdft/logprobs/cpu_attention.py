"""Attention in bfloat16 on a CPU: products in bfloat16, scores and softmax in float32, a few pieces at a time.

torch's flash kernel for CPUs takes 1.1 to 2.9 times as long (with 32 keys 7 times), with about the same error (0.2 to
0.3% of output and gradients in float64). In float32 there is no difference. The softmax is computed again in the
backward pass, so no more is kept than by the flash kernel.

Shape suffixes as in `attention.py`; P: pieces times key-value heads of a slice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

AT_ONCE, AT_MOST = 2**18, 2**20  # scores of a slice: of several heads, and of one


def takes_cpu(q: Tensor) -> bool:
    """Whether `cpu_attention` is the faster way for these queries."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and cpu_computes_bfloat16()


@functools.cache
def cpu_computes_bfloat16() -> bool:
    """Whether torch multiplies in bfloat16 on this CPU without emulating it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(scale * q k^T + mask) v for q [N, J, Q, E], k and v [N, J, K, E], mask [N, 1, Q, K]."""
    return _Attention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):  # bmm, not @, which copies the transposed factor of a single product
    """Dao et al. 2022 (arXiv 2205.14135), appendix B.2, with slices of pieces, heads and queries for tiles."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        """See `cpu_attention`."""
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, out = scale, torch.empty_like(q)
        for some, heads in _slices(q, k):
            k_PKE, v_PKE = (x[some, heads].flatten(0, 1) for x in (k, v))
            for queries in _steps(q.shape[2], AT_MOST // k.shape[2]):
                place = some, heads, queries
                weights_PQK = _weights(q[place].flatten(0, 1), k_PKE, mask[some, :, queries], scale)
                out[place] = torch.bmm(weights_PQK.to(v.dtype), v_PKE).view_as(out[place])
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of q, k and v."""
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some, heads in _slices(q, k):
            k_PKE, v_PKE = (x[some, heads].flatten(0, 1) for x in (k, v))
            sum_k = sum_v = None
            for queries in _steps(q.shape[2], AT_MOST // k.shape[2]):
                place = some, heads, queries
                q_PQE, grad_PQE = (x[place].flatten(0, 1) for x in (q, grad))
                weights_PQK = _weights(q_PQE, k_PKE, mask[some, :, queries], ctx.scale)
                sum_v = _plus(sum_v, torch.bmm(weights_PQK.to(v.dtype).transpose(1, 2), grad_PQE))
                slope_PQK = torch.bmm(grad_PQE, v_PKE.transpose(1, 2)).to(weights_PQK.dtype)
                slope_PQK.sub_((slope_PQK * weights_PQK).sum(-1, keepdim=True)).mul_(weights_PQK).mul_(ctx.scale)
                slope_PQK = slope_PQK.to(q.dtype)
                grad_q[place] = torch.bmm(slope_PQK, k_PKE).view_as(grad_q[place])
                sum_k = _plus(sum_k, torch.bmm(slope_PQK.transpose(1, 2), q_PQE))
            for whole, part in ((grad_k, sum_k), (grad_v, sum_v)):
                whole[some, heads] = part.view_as(whole[some, heads])
        return grad_q, grad_k, grad_v, None, None


def _weights(q_PQE: Tensor, k_PKE: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The softmax [P, Q, K] in float32, or in float64 for float64 queries."""
    wide = torch.promote_types(q_PQE.dtype, torch.float32)
    scores = mask.to(wide).expand(-1, len(q_PQE) // len(mask), -1, -1).flatten(0, 1).contiguous()
    return scores.baddbmm_(q_PQE.to(wide), k_PKE.to(wide).transpose(1, 2), alpha=scale).softmax(-1)


def _slices(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of pieces and of heads with at most `AT_ONCE` scores: several pieces with all heads, or heads of one."""
    (pieces, heads, queries, _), keys = q.shape, k.shape[2]
    for some in _steps(pieces, AT_ONCE // (heads * queries * keys)):
        for part in _steps(heads, AT_ONCE // (queries * keys)):
            yield some, part


def _steps(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, start + step) for start in range(0, length, step))


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum over slices of queries, in float32 if there are several."""
    return more if total is None else total.to(torch.promote_types(more.dtype, torch.float32)) + more
