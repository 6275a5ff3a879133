"""Attention in bfloat16 on a CPU: exact in float64, its error in bfloat16, its bits, and where it is used."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import make_llama, needs_bfloat16
from torch import nn

from lowdft.logprobs import Group, attention, score
from lowdft.logprobs import cpu_attention as module
from lowdft.logprobs.cpu_attention import cpu_attention


def inputs(n: int, heads: int, queries: int, keys: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, and a mask in which no query sees the last keys and the first query sees one key alone."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, t, size, generator=draw).to(dtype) for t in (queries, keys, keys))
    mask = torch.zeros(n, 1, queries, keys, dtype=dtype)
    mask[..., keys - 3 :] = mask[:, :, 0, 1:] = torch.finfo(dtype).min
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask]


@pytest.fixture(params=[None, (200, 24)], ids=["whole", "sliced"])
def slices(request, monkeypatch):
    """The usual size of slices, and one so small that pieces, heads and queries are each cut."""
    for name, value in zip(("AT_ONCE", "AT_MOST"), request.param or (), strict=bool(request.param)):
        monkeypatch.setattr(module, name, value)


def test_gradients_by_finite_differences(slices):
    q, k, v, mask = inputs(2, 3, 5, 8, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: cpu_attention(q, k, v, mask, None), (q, k, v))


def test_equals_torchs_attention_in_float64(slices):
    q, k, v, mask = inputs(3, 2, 5, 16, 8, torch.float64)
    found = cpu_attention(q, k, v, mask, 0.3)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    pull = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), pull) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@needs_bfloat16
@pytest.mark.parametrize("keys", [32, 64, 256, 1024])
def test_error_in_bfloat16_is_below_half_a_percent(keys):
    """Of output and gradients, against float64: torch's own kernel has 0.2 to 0.3%."""
    half = inputs(4, 3, 48, keys, 64, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in half[:3]] + [half[3].double()]
    found, wanted = cpu_attention(*half, None), nn.functional.scaled_dot_product_attention(*exact[:3], exact[3])
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = [found, *torch.autograd.grad(found, half[:3], pull)]
    theirs = [wanted, *torch.autograd.grad(wanted, exact[:3], pull.double())]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < 0.005 * other.norm()


@needs_bfloat16
def test_a_group_has_the_same_bits_among_any_others():
    """By lengths on both sides of every size that keys are padded to."""
    model = make_llama().bfloat16()
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(3, 97) for _ in range(n)]  # noqa: E731
    sizes = [(3, 5), (20, 12), (20, 13), (40, 24), (40, 25), (100, 28), (100, 29), (200, 56), (200, 57), (300, 90)]
    some = [Group(ids(prompt), [ids(length), ids(length - 2)]) for prompt, length in sizes]
    together = score(model, some).logps_C.split(2)
    for group, sums in zip(some, together, strict=True):
        assert torch.equal(score(model, [group]).logps_C, sums)


@needs_bfloat16
def test_it_is_used_in_bfloat16_alone(monkeypatch):
    seen = []
    ours = lambda q, k, v, mask, scale: seen.append(k.shape[2]) or cpu_attention(q, k, v, mask, scale)  # noqa: E731
    monkeypatch.setattr(attention, "cpu_attention", ours)
    model = make_llama().bfloat16()
    score(model, [Group([5] * 20, [[7] * 6]), Group([5] * 250, [[7] * 6, [8] * 7])])
    # the keys of a prompt and its completion, for the first group and for the second, whose completions differ in size
    assert sorted(seen) == sorted([32, 32, 256, 256, 384] * model.config.num_hidden_layers)
    seen.clear()
    score(model.float(), [Group([5] * 20, [[7] * 6])])
    assert not seen
