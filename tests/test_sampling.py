"""Samples: the right distribution, a seed a sample, and the same tokens from both transformers backends."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import make_llama

from lowdft.errors import UserError
from lowdft.logps import truncate
from lowdft.sampling import Request, SamplingSettings, draw, get_sampler, uniforms

END = [2]


def requests(n: int = 7) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return [
        Request(torch.randint(3, 97, (length,), generator=generator).tolist(), 100 + i)
        for i, length in enumerate(lengths)
    ]


def sampler(backend="padded", model=None, batch_size=3, **settings):
    settings = SamplingSettings(**({"temperature": 1.0, "top_k": 20, "max_new_tokens": 12} | settings))
    return get_sampler(backend, model or make_llama(), END, settings, batch_size)


SETTINGS = [
    SamplingSettings(1.0, 1.0, 0),
    SamplingSettings(0.7, 1.0, 5),
    SamplingSettings(1.3, 0.8, 0),
    SamplingSettings(1.0, 0.7, 6),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draw_has_the_truncated_distribution(settings):
    """20,000 evenly spread uniform numbers hit every token as often as its probability says, to 1e-4."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 11)
    wanted = truncate(logits / settings.temperature, settings.top_p, settings.top_k).softmax(1)[0]
    u = (torch.arange(20_000) + 0.5) / 20_000
    found = torch.bincount(draw(logits.expand(20_000, -1), u, settings), minlength=11) / 20_000
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_uniform_numbers_hang_on_the_seed():
    assert torch.equal(uniforms(3, 5), uniforms(3, 9)[:5])
    assert not torch.equal(uniforms(3, 5), uniforms(4, 5))


def test_order_and_batches_do_not_matter():
    some = requests()
    whole = sampler().sample(some)
    assert sampler(batch_size=7).sample(some) == whole
    assert sampler().sample(some[::-1]) == whole[::-1]
    assert sampler().sample(some[2:4]) == whole[2:4]


def test_greedy_is_generate():
    model, some = make_llama(), requests(1)
    out = model.generate(torch.tensor([some[0].prompt_ids]), do_sample=False, max_new_tokens=12, eos_token_id=2)
    wanted = out[0, len(some[0].prompt_ids) :].tolist()
    assert sampler(model=model, temperature=0.0).sample(some)[0].token_ids == wanted


def test_end_tokens():
    """A sample that stops ends in its one end token; one that is cut has its full length and no end token."""
    model = make_llama()
    model.lm_head.weight.data[2] += 0.15  # an end now and then
    samples = sampler(model=model).sample(requests(40))
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        ends = [i for i, token in enumerate(sample.token_ids) if token == 2]
        if sample.finish_reason == "stop":
            assert ends == [len(sample.token_ids) - 1]
        else:
            assert ends == [] and len(sample.token_ids) == 12


@pytest.mark.parametrize("training", [True, False])
def test_continuous_gives_the_same_tokens_and_leaves_the_model_alone(training):
    model = make_llama().train(training)
    model.lm_head.weight.data[2] += 0.15
    ids = torch.arange(3, 9)[None]
    before, attention = model(ids).logits, model.config._attn_implementation
    some = requests(20)
    assert sampler("continuous", model, batch_size=4).sample(some) == sampler("padded", model).sample(some)
    assert model.training is training and model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("backend", ["padded", "continuous"])
def test_no_requests_no_samples(backend):
    assert sampler(backend).sample([]) == []


def test_missing_vllm_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'pip install "lowdft\[vllm\]"'):
        get_sampler("vllm", None, END, SamplingSettings(), 4)
