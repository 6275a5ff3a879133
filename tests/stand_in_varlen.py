"""`torch.nn.attention.varlen.varlen_attn` in plain torch, for CPUs and any dtype, in its place."""

from __future__ import annotations

import torch

from lowdft.logprobs import varlen


def use(monkeypatch, kernel=None) -> list:
    """From here attention that a GPU would give to `varlen_attn` goes to `kernel`; returns its calls as they come."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return (kernel or varlen_attn)(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "varlen_is_right", lambda *_: True)
    return calls


def varlen_attn(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, num_splits, top_left=False
):
    """As torch documents it; with `top_left`, causality that is aligned at the first query and key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0 and num_splits == 1
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(q), len(k)) and len(k) == len(v)
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    assert q.dtype == k.dtype == v.dtype and enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    out = []
    for n in range(len(cu_seq_q) - 1):
        rows, columns = slice(cu_seq_q[n], cu_seq_q[n + 1]), slice(cu_seq_k[n], cu_seq_k[n + 1])
        keys, values = (x[columns].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[rows], keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        many = len(keys) - len(q[rows])
        after = torch.arange(len(q[rows]))[:, None] + (0 if top_left else many) - torch.arange(len(keys))
        seen = (after >= -right) & ((after <= left) | (left < 0))
        out.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(out)
