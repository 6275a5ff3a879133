"""The way through `varlen_attn`: when it is taken, what is gathered for it, and the trial that it must pass."""

from __future__ import annotations

import functools

import pytest
import stand_in_varlen
import torch
from helpers import make_llama, make_rows, make_trainer

from lowdft.logprobs import Group, choose_layout, lay_out, score
from lowdft.logprobs import varlen as path

CPU = torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch):
    """Puts a function in the place of torch's, as if it were on a GPU."""
    return functools.partial(stand_in_varlen.use, monkeypatch)


def queries(heads: int = 4, size: int = 8, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(5, heads, size).to(dtype)


def test_which_attention_takes_it(kernel):
    assert not path.takes_varlen(queries(), queries(), 0.0, None)  # no GPU
    kernel()
    assert path.takes_varlen(queries(), queries(2), 0.0, None)
    assert path.takes_varlen(queries(size=256), queries(2, 256), 0.0, None)
    assert not path.takes_varlen(queries(size=264), queries(2, 264), 0.0, None)
    assert not path.takes_varlen(queries(size=12), queries(2, 12), 0.0, None)
    assert not path.takes_varlen(queries(size=8), queries(2, 16), 0.0, None)
    assert not path.takes_varlen(queries(), queries(2), 0.1, None)
    assert not path.takes_varlen(queries(), queries(2), 0.0, 30.0)


@pytest.mark.parametrize(
    "capability, dtype, kernel_parameters, found",
    [
        ((8, 0), torch.bfloat16, {"enable_gqa", "num_splits"}, True),
        ((9, 0), torch.float16, {"enable_gqa", "num_splits"}, True),
        ((7, 5), torch.float16, {"enable_gqa", "num_splits"}, False),
        ((8, 0), torch.float32, {"enable_gqa", "num_splits"}, False),
        ((8, 0), torch.bfloat16, {"window_size"}, False),
        ((8, 0), torch.bfloat16, None, False),
    ],
)
def test_where_it_runs(capability, dtype, kernel_parameters, found, monkeypatch):
    """By the GPU, the dtype, and what torch's function takes; the trial itself is passed."""
    import inspect

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kernel_parameters or ()]
    function = lambda *args, **kwargs: None  # noqa: E731
    function.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(path, "varlen_attn", function if kernel_parameters else None)
    monkeypatch.setattr(path, "what_is_wrong", lambda *_: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    path.varlen_is_right.cache_clear()
    assert path.varlen_is_right(torch.device("cuda"), dtype, 64) == found
    path.varlen_is_right.cache_clear()


def no_gradient(*args, **kwargs):
    return stand_in_varlen.varlen_attn(*args, **kwargs).detach() * torch.ones((), requires_grad=True)


def failing(*args, **kwargs):
    raise RuntimeError("num_splits is not supported\nby this kernel")


def narrow(*args, window_size, **kwargs):
    left, right = window_size
    return stand_in_varlen.varlen_attn(*args, window_size=(left - 1 if left > 0 else left, right), **kwargs)


@pytest.mark.parametrize(
    "function, problem",
    [
        (stand_in_varlen.varlen_attn, None),
        (functools.partial(stand_in_varlen.varlen_attn, top_left=True), "its output differs by 1?[0-9]+%"),
        (narrow, r"its output differs.*\(window 3\)"),
        (no_gradient, "it fails"),
        (failing, "it fails .num_splits is not supported."),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_trial_finds_what_is_wrong(function, problem, kernel):
    """Also in a pass without gradient and under autocast, and without tensors saved by whoever counts them."""
    import re

    kernel(function)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hooks:
        found = path.what_is_wrong(CPU, torch.float32, 16)
    assert found is None if problem is None else re.match(problem, found), found
    assert not saved


def test_a_wrong_kernel_is_warned_of_and_not_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(path, "varlen_attn", stand_in_varlen.varlen_attn)
    monkeypatch.setattr(path, "what_is_wrong", lambda *_: "its output differs by 90%")
    path.varlen_is_right.cache_clear()
    with pytest.warns(UserWarning, match="does not use torch's varlen_attn here: its output differs by 90%"):
        assert not path.varlen_is_right(torch.device("cuda"), torch.bfloat16, 64)
    path.varlen_is_right.cache_clear()


def test_memory_that_runs_out_in_the_trial_is_no_verdict(kernel):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    kernel(short)
    with pytest.raises(torch.OutOfMemoryError):
        path.what_is_wrong(CPU, torch.float32, 16)


def test_the_check_at_the_start_goes_this_way_and_sees_wrong_causality(kernel):
    """Two rows of one layer each: packed with the right kernel, padded with one that is aligned at the top left."""
    calls = kernel()
    assert choose_layout(make_llama()) == "packed"
    assert len(calls) == make_llama().config.num_hidden_layers
    kernel(functools.partial(stand_in_varlen.varlen_attn, top_left=True))
    assert choose_layout(make_llama()) == "padded"


def test_pieces_worked_by_hand():
    """[7 8][5][6 4][9][3], and filler up to 16: keys of a completion are its prompt's, then its own."""
    rows = lay_out([Group([7, 8], [[5], [6, 4]]), Group([9], [[3]])])
    keys, turns, ends = rows.pieces.gathered
    filler = list(range(7, 16))
    assert keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6, *filler]
    assert ends.queries.tolist() == [0, 2, 3, 5, 6, 7, 16] and ends.keys.tolist() == [0, 2, 5, 9, 10, 12, 21]
    assert (ends.longest_queries, ends.longest_keys) == (9, 9)
    assert sorted(source for _, sources in turns for source in sources.tolist()) == list(range(21))
    for places, sources in turns:
        assert keys[sources].tolist() == places.tolist() and len(places.unique()) == len(places)


def test_neighbours_and_filler_change_nothing(kernel):
    """As far as the kernel keeps its word: here to the last bits of float64."""
    kernel()
    model = make_llama().double()
    a, b = (Group(r["prompt_ids"], [*r["negative_ids"], r["completion_ids"]]) for r in make_rows(2))
    alone = score(model, [a]).logps_C
    torch.testing.assert_close(score(model, [b, a]).logps_C[-len(alone) :], alone, rtol=1e-13, atol=1e-12)


def test_what_autocast_computes_in_is_what_the_kernel_gets(kernel):
    """A float32 model whose layers compute in bfloat16: rotated queries are float32, values bfloat16."""
    calls = kernel()
    from lowdft.logprobs import layers_in

    with layers_in(torch.bfloat16):
        score(make_llama(), [Group([3, 4], [[5, 6]])])
    assert {x.dtype for args in calls for x in args[:3]} == {torch.bfloat16} and calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_this_way_too(checkpointing, kernel, tmp_path):
    """Losses of four steps as with SDPA; checkpointed layers go it again."""
    from helpers import losses

    settings = dict(max_steps=4, gradient_checkpointing=checkpointing, logging_steps=1)
    plain = make_trainer(tmp_path / "a", **settings)
    plain.train()
    calls = kernel()
    packed = make_trainer(tmp_path / "b", **settings)
    packed.train()
    assert calls and losses(packed) == pytest.approx(losses(plain), rel=1e-4)
