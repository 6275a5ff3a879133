"""Scores of whole prompt groups against one completion at a time through the plain model, for every model family."""

from __future__ import annotations

import random

import pytest
import stand_in_varlen
import torch
from helpers import COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from lowdft.compat import checkpoint_layers
from lowdft.errors import UserError
from lowdft.logprobs import Group, choose_layout, lay_out, packed_attention, score

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"sliding_window": 6},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
}


@pytest.fixture(params=["sdpa", "varlen"])
def kernel(request, monkeypatch) -> str:
    """What packed rows attend by: SDPA, or `varlen_attn` as on a GPU."""
    if request.param == "varlen":
        stand_in_varlen.use(monkeypatch)
    return request.param


@pytest.fixture(params=["packed", "packed by varlen", "padded"])
def layout(request, monkeypatch) -> str:
    """A layout; packed ones by both kernels."""
    if request.param == "packed by varlen":
        stand_in_varlen.use(monkeypatch)
    return request.param.split()[0]


def make(family: str, attention: str | None = None):
    torch.manual_seed(0)
    if family == "gemma2":  # transformers 5.20 takes sdpa, which leaves out its soft caps
        attention = "eager"
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def groups(seed: int = 0) -> list[Group]:
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(3, 97) for _ in range(n)]

    return [Group(ids(7), [ids(5), ids(9), ids(3)]), Group(ids(3), [ids(12), ids(1), ids(6)])]


def one_by_one(model, some_groups) -> torch.Tensor:
    out = []
    for group in some_groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            logps = model(ids).logits.log_softmax(-1)[0]
            start = len(group.prompt_ids) - 1
            out.append(sum(logps[start + i, token] for i, token in enumerate(completion)))
    return torch.stack(out)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-5), (torch.float64, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, layout, dtype, close):
    """Within 1e-3 nats a sequence; gradients of every parameter within 1e-5 relative (2e-5 with float32's rounding)."""
    model, some = make(family).to(dtype), groups()
    pull = torch.arange(1.0, 7.0, dtype=dtype)
    wanted, found = one_by_one(model, some), score(model, some, layout, chunk_size=4).logps_C
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(found @ pull, parameters, allow_unused=True)
    theirs = torch.autograd.grad(wanted @ pull, parameters, allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if b is not None and b.norm() > 1e-6:
            assert (a - b).norm() / b.norm() < close, name


def test_eager_attention_gives_the_same(kernel):
    some = groups()
    torch.testing.assert_close(
        score(make("gemma3_text", "eager"), some).logps_C,
        score(make("gemma3_text", "sdpa"), some).logps_C,
        rtol=0,
        atol=1e-3,
    )


def test_order_of_negatives_does_not_matter(kernel):
    model = make("llama")
    prompt, (a, b, c) = groups()[0].prompt_ids, groups()[0].completions
    forth = score(model, [Group(prompt, [a, b, c])]).logps_C
    back = score(model, [Group(prompt, [c, a, b])]).logps_C
    torch.testing.assert_close(forth, back[[1, 2, 0]], rtol=0, atol=1e-4)


def test_counts_tokens():
    out = score(make("llama"), groups())
    assert out.tokens_C.tolist() == [5, 9, 3, 12, 1, 6]
    assert out.per_token_logps_S.shape == (36,)


def test_rows_worked_by_hand():
    """[7 8][5][6 4]: both completions start at position 2, predicted by the prompt's last token; then filler."""
    rows = lay_out([Group([7, 8], [[5], [6, 4]])])
    assert rows.input_ids_RL[0, :5].tolist() == [7, 8, 5, 6, 4] and not rows.input_ids_RL[0, 5:].any()
    assert rows.position_ids_RL[0, :5].tolist() == [0, 1, 2, 2, 3]
    assert rows.predictor_S.tolist() == [1, 1, 3]
    assert rows.target_S.tolist() == [5, 6, 4]
    assert rows.place_S.tolist() == [2, 3, 4]
    assert rows.completion_S.tolist() == [0, 1, 1]
    prompts, completions = rows.pieces.parts
    assert prompts.key_NK[0, :2].tolist() == [0, 1]
    assert completions.query_NQ[:, :2].tolist() == [[2, 2], [3, 4]]
    assert completions.key_NK[:, :4].tolist() == [[0, 1, 2, 2], [0, 1, 3, 4]]
    seen = completions.mask(None, torch.float32, 1)[:, 0, :2, :4] == 0
    assert seen[0, 0].tolist() == [True, True, True, False]
    assert seen[1].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert (completions.mask(2, torch.float32, 1)[1, 0, 1, :4] == 0).tolist() == [False, False, True, True]


def test_neighbours_change_nothing_in_bfloat16():
    """A group scores the same bits alone, without its last completion, and among longer groups."""
    model = make("llama").bfloat16()
    a, b = groups()
    rng = random.Random(1)
    long = Group([rng.randrange(3, 97) for _ in range(90)], [[rng.randrange(3, 97) for _ in range(150)]])
    alone = score(model, [a]).logps_C
    assert torch.equal(score(model, [a, b]).logps_C[:3], alone)
    assert torch.equal(score(model, [long, a, b]).logps_C[1:4], alone)
    assert torch.equal(score(model, [Group(a.prompt_ids, a.completions[:2])]).logps_C, alone[:2])


def test_other_attention_fails_loudly(kernel):
    """Were the backward pass of a checkpointed layer run without `packed_attention`, it must not go unnoticed."""
    model = make("llama").train()
    checkpoint_layers(model, {"use_reentrant": False})
    loss = score(model, groups()).logps_C.sum()
    with pytest.raises(RuntimeError):
        loss.backward()
    with packed_attention(model):
        score(model, groups()).logps_C.sum().backward()


def test_layout_is_chosen_by_trial(kernel):
    """A model that attends across the packed row gives itself away, and gets padded rows."""
    model = make("llama")
    assert choose_layout(model) == "packed"
    decoder, original = model.get_decoder(), model.get_decoder().forward

    def deaf(pieces=None, attention_mask=None, **inputs):
        model.config._attn_implementation = "sdpa"
        return original(attention_mask=None if pieces else attention_mask, **inputs)

    decoder.forward = deaf
    assert choose_layout(model) == "padded"


def test_head_under_an_adapter_is_refused(llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="plain linear head"):
        score(model, groups())


def partly_predicted_by_hand(model, some_groups, share) -> torch.Tensor:
    out, embed = [], model.get_input_embeddings()
    for group in some_groups:
        for completion in group.completions:
            start, ids = len(group.prompt_ids), torch.tensor([[*group.prompt_ids, *completion]])
            predicted = model(ids).logits[:, start - 1 : -1].argmax(-1)
            prompt, tokens = embed(ids).split([start, len(completion)], dim=1)
            mixed = torch.cat([prompt, (1 - share) * tokens + share * embed(predicted)], dim=1)
            logps = model(inputs_embeds=mixed).logits.log_softmax(-1)[0]
            out.append(logps[range(start - 1, start - 1 + len(completion)), completion].sum())
    return torch.stack(out)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text"])
def test_completions_partly_of_predicted_embeddings(family, layout):
    """Scores and gradients with a fifth of the prediction's embedding in every completion token's."""
    model, some = make(family).double(), groups()
    wanted = partly_predicted_by_hand(model, some, 0.2)
    found = score(model, some, layout, chunk_size=4, predicted_share=0.2).logps_C
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - score(model, some, layout).logps_C).abs().max() > 0.1
    ours, theirs = (torch.autograd.grad(x.sum(), list(model.parameters())) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_adapter_learns_after_its_own_prediction():
    """On a half base, whose float32 adapter weights autocast copies: not those of the pass without gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama").bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
    score(model, groups(), predicted_share=0.2).logps_C.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert max(p.grad.abs().max() for p in model.parameters() if p.requires_grad) > 0


def mixed_groups() -> list[Group]:
    """One completion of 1,000 tokens among 47 of 27, with prompts of 9."""
    short, long = [5] * 27, [6] * 1000
    return [Group([3] * 9, [short, short, short if n else long]) for n in range(16)]


def test_one_long_completion_does_not_pad_the_others():
    """Query rows of a packed row stay near its tokens: at most twice as many, not 37 times."""
    rows = lay_out(mixed_groups())
    tokens = sum(group.num_tokens for group in mixed_groups())
    assert sum(part.query_NQ.numel() for part in rows.pieces.parts) < 2 * tokens
    assert sum(part.key_NK.numel() for part in rows.pieces.parts) < 5 * tokens
    places = torch.cat([part.place_X for part in rows.pieces.parts])
    assert sorted(places.tolist()) == list(range(tokens))


def test_mixed_lengths_score_as_one_by_one(kernel):
    model, rng = make("mistral"), random.Random(2)

    def ids(n):
        return [rng.randrange(3, 97) for _ in range(n)]

    some = [Group(ids(40), [ids(1), ids(150), ids(20), ids(17)]), Group(ids(3), [ids(33), ids(2)])]
    assert len(lay_out(some).pieces.parts) > 4
    found, wanted = score(model, some).logps_C, one_by_one(model, some)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    pull = torch.arange(1.0, 7.0)
    ours, theirs = (torch.autograd.grad(x @ pull, list(model.parameters())) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_no_gradient_goes_through_additions_of_any_order(kernel):
    """On a GPU `index_select` goes back through atomic additions; ours adds no place twice in one call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "index_add" in str(function):
                index = args[2]
                assert len(index.unique()) == len(index), "a place is added to twice"
            return function(*args, **(kwargs or {}))

    model = make("llama").bfloat16()
    out = score(model, groups())
    with Watch():
        out.per_token_logps_S.sum().backward()


def test_sums_have_the_same_bits_in_any_order():
    from lowdft.logprobs.engine import _sums

    torch.manual_seed(0)
    values = -torch.rand(3000) * 20
    order = torch.randperm(3000)
    owner = torch.randint(3, (3000,))
    assert torch.equal(_sums(values, owner, 3), _sums(values[order], owner[order], 3))
    alone = torch.stack([_sums(values[owner == c], owner[owner == c] * 0, 1)[0] for c in range(3)])
    assert torch.equal(_sums(values, owner, 3), alone)
    exact = torch.stack([values[owner == c].double().sum() for c in range(3)])
    torch.testing.assert_close(alone.double(), exact, rtol=1e-7, atol=0)


LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
    original_max_position_embeddings=20,
)  # fmt: skip


def test_19_a_longer_neighbour_does_not_change_longrope(layout):
    """Phi-3: a pass with a sequence beyond the original context takes other frequencies, for all of its tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **COMMON, original_max_position_embeddings=20, rope_parameters=LONGROPE)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    some = [Group([7] * 8, [[5, 6, 9], list(range(20, 50)), [11] * 12]), Group(list(range(30)), [[4, 8]])]
    out, wanted = score(model, some, layout), one_by_one(model, some)
    torch.testing.assert_close(out.logps_C, wanted, rtol=0, atol=1e-3)
    assert out.tokens_C.tolist() == [3, 30, 12, 2]
    sums = torch.stack([x.sum() for x in out.per_token_logps_S.split([3, 30, 12, 2])])
    torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-3)
