"""Samples depend on their own seed alone, follow the target distribution, and leave the model as it was."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import VOCABULARY, make_llama, make_requests, sharp_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from lowdft.errors import UserError
from lowdft.sampling import Request, SamplingSettings, get_sampler
from lowdft.sampling.draw import draw, fitting

SETTINGS = SamplingSettings(temperature=0.9, top_k=20, top_p=0.95, max_new_tokens=12)
END = [2, 5]
BACKENDS = pytest.mark.parametrize("backend", ["padded", "continuous"])


@BACKENDS
def test_temperature_0_is_greedy(backend):
    model, requests = sharp_llama(), make_requests(5)
    samples = get_sampler(backend, model, END, SamplingSettings(temperature=0, max_new_tokens=8), 3).sample(requests)
    for request, sample in zip(requests, samples, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=0)
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        assert sample.token_ids == written[0, prompt.shape[1] :].tolist()


@BACKENDS
def test_a_sample_depends_on_its_own_request_alone(backend):
    model, requests = sharp_llama(), make_requests()
    expected = get_sampler("padded", model, END, SETTINGS, 1).sample(requests)
    assert len({tuple(sample.token_ids) for sample in expected}) == len(requests)
    for batch_size in (2, 64):
        sampler = get_sampler(backend, model, END, SETTINGS, batch_size)
        assert sampler.sample(requests) == expected
        assert sampler.sample(requests[::-1]) == expected[::-1]
        assert sampler.sample(requests[3:7]) == expected[3:7]


@BACKENDS
def test_out_of_memory_halves_the_batch(backend, monkeypatch):
    """With room for three samples at once: the same samples, and a warning that says what to set."""
    requests = make_requests()
    expected = get_sampler("padded", sharp_llama(), END, SETTINGS, 64).sample(requests)

    def short(scores, *rest):
        if len(scores) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return draw(scores, *rest)

    monkeypatch.setattr(f"lowdft.sampling.{backend}.draw", short)
    sampler = get_sampler(backend, sharp_llama(), END, SETTINGS, 12)
    with pytest.warns(UserWarning, match="set batch_size=3"):
        assert sampler.sample(requests) == expected
    assert sampler.batch_size == 3


@BACKENDS
def test_no_memory_for_one_sample_says_what_to_do(backend, monkeypatch):
    def never(*args):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(f"lowdft.sampling.{backend}.draw", never)
    with pytest.raises(UserError, match="max_new_tokens|smaller negatives.batch_size"):
        get_sampler(backend, sharp_llama(), END, SETTINGS, 1).sample(make_requests(2))


OWN_ATTENTION = {  # and what sizes of them are called otherwise
    "bloom": dict(n_head=4),
    "mpt": dict(n_heads=4, d_model=32),
    "falcon": dict(alibi=True),
    "gptj": dict(n_embd=32, n_head=4, rotary_dim=4),
    "codegen": dict(n_embd=32, n_head=4, rotary_dim=4),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "xglm": dict(d_model=32, ffn_dim=32, num_layers=2, attention_heads=4),
}


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_12_continuous_batching_is_refused_for_models_with_attention_of_their_own(family):
    """transformers would go on with the model's own attention, which knows no pages, and write wrong tokens."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, n_layers=2,
        n_layer=2, eos_token_id=2, bos_token_id=1, pad_token_id=0, **OWN_ATTENTION[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="ALiBi.*negatives.backend=padded"):
        get_sampler("continuous", model, END, SETTINGS, 4).sample(make_requests(2))


@pytest.mark.parametrize("free", [80e9, 2e5, 1e3])
def test_samples_at_once_follow_a_gpus_free_memory(free, monkeypatch):
    """Half of it, by the longest request: 51 tokens of 2 layers with 2 heads of 8, and logits of 97 tokens."""
    model, requests = make_llama(), make_requests()
    longest = max(len(request.prompt_ids) for request in requests) + SETTINGS.max_new_tokens
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free), 0))
    each = longest * 2 * 2 * 2 * 8 * 4 + 32 * VOCABULARY
    assert fitting(model, requests, SETTINGS) == max(1, min(13, int(free / 2 / each)))


@BACKENDS
def test_samples_of_one_prompt_differ_by_seed_alone(backend):
    prompt = list(range(6, 76))  # more than two pages, which continuous batching shares
    requests = [Request(prompt, seed) for seed in (1, 2, 3, 1)]
    samples = get_sampler(backend, sharp_llama(), END, SETTINGS, 2).sample(requests)
    assert samples[0] == samples[3]
    assert len({tuple(sample.token_ids) for sample in samples}) == 3


def test_eviction_from_a_full_cache_changes_no_token(monkeypatch):
    model, settings = sharp_llama(), SamplingSettings(temperature=0.9, top_k=20, max_new_tokens=60)
    model.lm_head.weight.data[2] = 0  # never among the top 20, so that every sample is long
    requests = [Request([6 + i, 7, 8], i) for i in range(6)]
    sampler = get_sampler("continuous", model, [2], settings, 6)
    sized, restart, evicted = sampler._cache, RequestState.create_equivalent_initial_request, []

    def small(*args):
        config = sized(*args)
        config.num_blocks = 7  # of 32 tokens, for 6 requests of 63
        return config

    def watched(state):
        evicted.append(len(state.generated_tokens))
        return restart(state)

    monkeypatch.setattr(sampler, "_cache", small)
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", watched)
    assert sampler.sample(requests) == get_sampler("padded", model, [2], settings, 6).sample(requests)
    assert max(evicted) > 0


@BACKENDS
def test_end_tokens(backend):
    """A sample that stops ends in its one end token; one that is cut has its full length and no end token."""
    samples = get_sampler(backend, sharp_llama(), END, SETTINGS, 16).sample(make_requests(40))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        ends = [i for i, token in enumerate(sample.token_ids) if token in END]
        if sample.finish_reason == "stop":
            assert ends == [len(sample.token_ids) - 1]
        else:
            assert ends == [] and len(sample.token_ids) == SETTINGS.max_new_tokens


@BACKENDS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_its_own_generation_settings_do_not_count(backend, attention, training):
    model = sharp_llama().train(training)
    model.set_attn_implementation(attention)
    model.model.layers[0].train(not training)
    model.generation_config.repetition_penalty = 5.0
    modes, own = [module.training for module in model.modules()], model.generation_config
    ids = torch.arange(6, 26)[None]
    mask = torch.full((1, 1, 20, 20), -1e9).triu(1)  # 4-D, as in training
    before = model(input_ids=ids, attention_mask=mask).logits
    samples = get_sampler(backend, model, END, SETTINGS, 4).sample(make_requests())
    assert samples == get_sampler("padded", sharp_llama(), END, SETTINGS, 4).sample(make_requests())
    assert model.config._attn_implementation == attention
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and own.repetition_penalty == 5.0
    after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(after, before) and after.requires_grad


@BACKENDS
def test_an_adapter_counts_while_it_is_on(backend):
    requests = make_requests(4)
    base = get_sampler("padded", sharp_llama(), END, SETTINGS, 4).sample(requests)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(sharp_llama(), config)
    sampler = get_sampler(backend, model, END, SETTINGS, 4)
    adapted = sampler.sample(requests)
    assert adapted != base
    assert adapted == get_sampler("padded", model, END, SETTINGS, 1).sample(requests)
    with model.disable_adapter():
        assert sampler.sample(requests) == base


@BACKENDS
def test_no_requests_no_samples(backend):
    assert get_sampler(backend, make_llama(), END, SETTINGS, 4).sample([]) == []


def test_a_failure_of_continuous_batching_is_told_and_leaves_the_model_as_it_was(monkeypatch):
    model = sharp_llama().train()
    model.set_attn_implementation("eager")
    monkeypatch.setattr("lowdft.sampling.continuous.draw", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="division by zero.*negatives.backend=padded"):
        get_sampler("continuous", model, END, SETTINGS, 4).sample(make_requests(3))
    assert model.config._attn_implementation == "eager" and model.training


def test_an_interruption_does_not_wait_for_the_rest(monkeypatch):
    steps = []

    def interrupted(manager, *args, **kwargs):
        raise KeyboardInterrupt

    def counted(*args):
        steps.append(1)
        return draw(*args)

    monkeypatch.setattr("lowdft.sampling.continuous.draw", counted)
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.continuous_api.ContinuousBatchingManager.get_result", interrupted
    )
    model = sharp_llama()
    model.lm_head.weight.data[0] = 0  # never among the top 20: every sample would take 200 steps
    with pytest.raises(KeyboardInterrupt):
        settings = SamplingSettings(top_k=20, max_new_tokens=200)
        get_sampler("continuous", model, [0], settings, 4).sample(make_requests())
    assert len(steps) < 200


def test_missing_vllm_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'pip install "lowdft\[vllm\]"'):
        get_sampler("vllm", None, END, SETTINGS, 4)
