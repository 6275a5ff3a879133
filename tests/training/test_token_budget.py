"""Passes: any budget gives the same gradient, passes keep to it, and running out of memory costs only time."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import losses, make_llama, make_trainer

from lowdft.errors import UserError
from lowdft.logprobs import Group, score
from lowdft.training.token_budget import Passes, num_tokens


def make_groups(n: int = 5, count: int = 3) -> list[Group]:
    rng = random.Random(0)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 97) for _ in range(rng.randrange(1, most))]

    return [Group(ids(9), [ids(12) for _ in range(count)]) for _ in range(n)]


def pairwise(numbers, logps_MK):
    """A loss in which every completion's derivative depends on all the others' scores."""
    return -torch.nn.functional.logsigmoid(0.1 * (logps_MK[:, -1:] - logps_MK[:, :-1])).sum()


def gradient(passes: Passes, surrogate=pairwise, groups=None):
    model = make_llama().double()
    scored = passes.backpropagate(model, groups or make_groups(), surrogate, lambda loss, last: loss.backward())
    return scored, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
def test_any_budget_gives_the_gradient_of_one_graph(layout, budget):
    """Within 1e-6 (the model's norms are float32): the chain rule through log-probabilities."""
    model, groups = make_llama().double(), make_groups()
    logps_MK = score(model, groups).logps_C.view(len(groups), -1)
    pairwise(range(len(groups)), logps_MK).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    scored, found = gradient(Passes(layout, 64, budget))
    torch.testing.assert_close(scored.logps_MK, logps_MK.detach(), rtol=0, atol=1e-5)
    assert (found - wanted).norm() / wanted.norm() < 1e-6


def test_passes_keep_to_the_budget(monkeypatch):
    """No forward pass computes more than the budget unless it holds one completion alone."""
    seen: list[list[Group]] = []
    spy = lambda model, groups, *rest: seen.append(groups) or score(model, groups)  # noqa: E731
    monkeypatch.setattr("lowdft.training.token_budget.score", spy)
    gradient(Passes("packed", 64, tokens_per_pass=25))
    assert len(seen) > 4
    for groups in seen:
        fits = sum(num_tokens(group, "packed") for group in groups) <= 25
        assert fits or (len(groups) == 1 and len(groups[0].completions) == 1)


def test_passes_are_of_like_size():
    """16 groups of 10 tokens, 5 of which fit a pass: four passes of four, not 5 + 5 + 5 + 1."""
    groups = [Group([1] * 4, [[2] * 3, [3] * 3]) for _ in range(16)]
    scored, passes = Passes("packed", 64, tokens_per_pass=52).expected(groups)
    assert scored == [] and [len(some) for some in passes] == [4, 4, 4, 4]


def test_what_a_long_group_takes_is_expected():
    """A group of 34 tokens at 20 per pass: two completions a pass, which are scored first."""
    scored, passes = Passes("packed", 64, tokens_per_pass=20, knows_last=True).expected([Group([1] * 4, [[2] * 6] * 5)])
    assert [len(some[0].completions) for some in scored] == [2, 2]
    assert [len(some[0].completions) for some in passes] == [2, 2, 1]


def test_what_cublas_says_is_out_of_memory(monkeypatch):
    """No OutOfMemoryError, and yet memory ran out; any other RuntimeError stays one."""
    calls = []

    def once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        if len(calls) == 10:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return score(*args)

    monkeypatch.setattr("lowdft.training.token_budget.score", once)
    passes, model, groups = Passes("packed", 64, 10_000), make_llama(), make_groups()
    with pytest.warns(UserWarning, match="a pass takes at most"):
        found = passes.score(model, groups)
    torch.testing.assert_close(found.flatten(), score(model, groups).logps_C, rtol=1e-4, atol=1e-4)
    calls[:] = [()] * 9
    with pytest.raises(RuntimeError, match="mat1"):
        passes.score(model, groups)


def test_padded_passes_keep_to_the_budget_with_their_padding():
    """One prompt with a long completion beside many short ones: rows times the longest row stay within the budget."""
    groups = [Group([1] * 4, [[5] * 60])] + [Group([1] * 4, [[5] * 4]) for _ in range(15)]
    passes, seen = Passes("padded", 64, tokens_per_pass=128), []
    model = make_llama()
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    passes.score(model, groups)
    assert max(seen) <= 128 and len(seen) <= 4


def fail(monkeypatch, *at: int):
    """The forward passes with these numbers run out of memory."""
    calls = []

    def score_or_fail(*args):
        calls.append(args)
        if len(calls) in at:
            raise torch.OutOfMemoryError("simulated")
        return score(*args)

    monkeypatch.setattr("lowdft.training.token_budget.score", score_or_fail)


@pytest.mark.parametrize("at", [[1], [11], [12], [13], [14], [17], [12, 13], [12, 14], [12, 13, 15]], ids=str)
def test_out_of_memory_costs_only_time(at, tmp_path, monkeypatch):
    """In scoring the reference (passes 1 to 10), in a step's first or second micro-batch, in what is done again."""
    settings = dict(per_device_train_batch_size=3)
    whole = make_trainer(tmp_path / "a", **settings)
    whole.train()
    fail(monkeypatch, *at)
    broken = make_trainer(tmp_path / "b", **settings)
    with pytest.warns(UserWarning, match="a pass takes at most"):
        broken.train()
    assert broken.engine.passes.budget < 8192
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-4)
    torch.testing.assert_close(broken.log_u, whole.log_u, rtol=1e-3, atol=1e-4)


def test_random_numbers_begin_again(tmp_path, monkeypatch):
    """A second micro-batch fails: the first is computed again with the dropout it had, so the same weights come out."""
    settings = dict(per_device_train_batch_size=1, dropout=0.5, max_steps=1, reference="online")
    whole = make_trainer(tmp_path / "a", **settings)
    whole.train()
    monkeypatch.setattr(Passes, "shrink", lambda *_: None)
    fail(monkeypatch, 4)
    broken = make_trainer(tmp_path / "b", **settings)
    broken.train()
    for (name, a), b in zip(whole.model.named_parameters(), broken.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = make_trainer(tmp_path / "c", seed=1, **settings)
    other.train()
    pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs), "dropout must matter for this test to say anything"


def test_out_of_memory_for_good_is_told(tmp_path, monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("simulated")

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("lowdft.training.token_budget.score", never)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="max_length"):
        trainer.train()


@pytest.mark.parametrize("objective", ["dft", "dft2"])
def test_training_is_the_same_in_pieces(objective, tmp_path):
    """A budget of one token (every completion alone, scored first) trains as one pass does, log_u included."""
    whole, pieces = (make_trainer(tmp_path / str(n), objective=objective, tokens_per_pass=n) for n in (8192, 1))
    whole.train()
    pieces.train()
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-4)
    torch.testing.assert_close(pieces.log_u, whole.log_u, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = make_trainer(tmp_path / "a")
    again = make_trainer(tmp_path / "b", gradient_checkpointing=True)
    plain.train()
    again.train()
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    torch.testing.assert_close(again.log_u, plain.log_u, rtol=1e-4, atol=1e-5)
