"""Log-probabilities in chunks are those of a full log-softmax, forward and backward."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_bfloat16

from lowdft.logprobs import Head, chunk_for, proposal_logps, token_logps, truncate


def reference(hidden, head, target):
    """The same by the book: a whole matrix of logits, bent, and its log-softmax."""
    logits = hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_full_log_softmax(scale, softcap, bias):
    """Values within 1e-12 and all gradients within 1e-10 in float64, with chunks that do not divide."""
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(17, dtype=torch.float64, requires_grad=True) if bias else None
    target, pull = torch.randint(17, (11,)), torch.randn(11, dtype=torch.float64)
    head = Head(weight, offset, scale, softcap)
    inputs = [t for t in (hidden, weight, offset) if t is not None]
    wanted = reference(hidden, head, target)
    found = token_logps(hidden, head, target, chunk_size=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found @ pull, inputs), torch.autograd.grad(wanted @ pull, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, None), (2.0, 3.0)])
def test_a_frozen_head_gives_the_same(scale, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(17, 6, dtype=torch.float64), torch.randn(17, dtype=torch.float64), scale, softcap)
    target, pull = torch.randint(17, (11,)), torch.randn(11, dtype=torch.float64)
    found, wanted = token_logps(hidden, head, target, chunk_size=4), reference(hidden, head, target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x @ pull, hidden)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_gradcheck():
    torch.manual_seed(0)
    head = Head(torch.randn(7, 4, dtype=torch.float64), softcap=2.0)
    target = torch.tensor([0, 6, 3, 3, 1])
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: token_logps(h, head, target, chunk_size=2), hidden)


def test_logits_exist_one_chunk_at_a_time(monkeypatch):
    """Logits are never more than [chunk, vocabulary]; a frozen head gets no gradient and computes them once."""
    seen = []
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: seen.append(len(hidden)) or original(self, hidden))
    hidden = torch.randn(10, 4, requires_grad=True)
    head = Head(torch.randn(9, 4))
    token_logps(hidden, head, torch.zeros(10, dtype=torch.int64), chunk_size=3).sum().backward()
    assert seen == [3, 3, 3, 1]
    assert head.weight_VD.grad is None
    trainable = Head(torch.randn(9, 4, requires_grad=True))
    token_logps(hidden, trainable, torch.zeros(10, dtype=torch.int64), chunk_size=3).sum().backward()
    assert seen == [3, 3, 3, 1] * 3


@needs_bfloat16
def test_chunks_change_no_bit_in_bfloat16():
    """Nor do the tokens that share a chunk: a vocabulary of 5,000, and hidden states of 192 numbers."""
    torch.manual_seed(0)
    head = Head((torch.randn(5000, 192) * 0.1).bfloat16())
    hidden, target = torch.randn(515, 192).bfloat16(), torch.randint(5000, (515,))
    whole = token_logps(hidden, head, target)
    for size in (1, 7, 16, 100, 128, 256, 512):
        assert torch.equal(token_logps(hidden, head, target, size), whole), size
        assert torch.equal(token_logps(hidden[:size], head, target[:size]), whole[:size]), size


@pytest.mark.parametrize(
    "vocabulary, cpu, gpu",
    [(97, 1024, 1024), (32_000, 512, 1024), (49_152, 256, 1024), (128_256, 128, 512), (151_936, 128, 512),
     (262_144, 64, 256), (10**9, 1, 1)],
)  # fmt: skip
def test_chunks_follow_from_the_vocabulary(vocabulary, cpu, gpu):
    """Powers of two, whose float32 logits fit 100 and 320 MB."""
    assert (chunk_for(vocabulary, "cpu"), chunk_for(vocabulary, "cuda")) == (cpu, gpu)


def test_a_head_takes_the_chunk_of_its_vocabulary(monkeypatch):
    seen, original = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: seen.append(len(hidden)) or original(self, hidden))
    token_logps(torch.randn(600, 2), Head(torch.randn(49_152, 2)), torch.zeros(600, dtype=torch.int64))
    assert seen == [256, 256, 88]


def test_proposal_is_the_samplers_density():
    """Temperature .5 squares the odds; top-k 2 leaves two, and the drawn one if rounding had it among them."""
    head = Head(torch.eye(4))
    hidden = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).repeat(3, 1)
    found = proposal_logps(hidden, head, torch.tensor([0, 1, 2]), temperature=0.5, top_p=1.0, top_k=2)
    assert found.exp().tolist() == pytest.approx([16 / 25, 9 / 25, 4 / 29])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert truncate(logits, top_p=0.8, top_k=0).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits, top_p=0.81, top_k=0).isfinite().tolist() == [[True, True, True, False]]


def test_equals_trl():
    """The same numbers as TRL's selective_log_softmax on the whole matrix of logits."""
    utils = pytest.importorskip("trl.trainer.utils")
    torch.manual_seed(0)
    head, hidden, target = Head(torch.randn(50, 8)), torch.randn(13, 8), torch.randint(50, (13,))
    wanted = utils.selective_log_softmax(head.logits(hidden), target)
    torch.testing.assert_close(token_logps(hidden, head, target, chunk_size=5), wanted, rtol=1e-6, atol=1e-6)
