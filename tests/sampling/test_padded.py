"""Padded batches compute what prompts share once, and stop where a stop text is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import make_llama, make_requests, sharp_llama
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from lowdft.sampling import Request, SamplingSettings, get_sampler

SETTINGS = SamplingSettings(temperature=0.9, top_k=20, top_p=0.95, max_new_tokens=12)
END = [2, 5]


@pytest.mark.parametrize("window", [None, 6])
def test_a_prompt_is_computed_once_for_all_of_its_samples(window):
    """Four samples each of three prompts (one of a single token, beside longer ones), by the first layer's inputs."""
    model = sharp_llama() if window is None else make_mistral(window)
    prompts = [list(range(6, 36)), list(range(40, 60)), [9]]
    requests = [Request(prompt, 10 * i + k) for i, prompt in enumerate(prompts) for k in range(4)]
    expected = get_sampler("padded", model, END, SETTINGS, 1).sample(requests)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    for order in (requests, requests[::-1], requests[::5] + requests):
        seen.clear()
        found = get_sampler("padded", model, END, SETTINGS, 64).sample(order)
        assert found == [expected[requests.index(request)] for request in order]
        assert seen[0] == (3, 29) and all(length == 1 for _, length in seen[1:])
    handle.remove()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("copies", [1, 3])
def test_what_all_prompts_begin_with_is_computed_once(window, copies):
    """Twenty shared tokens, then prompts of different lengths; not with sliding windows, which count padding too."""
    model = sharp_llama() if window is None else make_mistral(window)
    prompts = [[*range(10, 30), *rest] for rest in ([31, 32], [33, 34, 35, 36, 37], list(range(40, 60)))]
    requests = [Request(prompt, 10 * i + k) for i, prompt in enumerate(prompts) for k in range(copies)]
    expected = get_sampler("padded", model, END, SETTINGS, 1).sample(requests)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    assert get_sampler("padded", model, END, SETTINGS, 64).sample(requests) == expected
    handle.remove()
    if window is None:
        assert seen[:2] == [(1, 20), (3, 19)] and all(length == 1 for _, length in seen[2:])
    else:
        assert seen[0] == ((3, 39) if copies > 1 else (3, 40))


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mpt", "gemma3_text"])
def test_a_shared_beginning_changes_no_sample_of_other_families(family):
    """Learned positions, ALiBi, sliding windows: whether they share it or not."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, pad_token_id=0)
    if family == "gemma3_text":
        sizes |= dict(intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8)
    if family == "opt":
        sizes |= dict(ffn_dim=48, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    generator = torch.Generator().manual_seed(1)
    rest = [torch.randint(6, 97, (length,), generator=generator).tolist() for length in (2, 5, 17)]
    requests = [Request([*range(10, 30), *ids], i) for i, ids in enumerate(rest)]
    expected = get_sampler("padded", model, END, SETTINGS, 1).sample(requests)
    assert get_sampler("padded", model, END, SETTINGS, 64).sample(requests) == expected


def test_a_sample_that_contains_a_stop_text_is_not_continued():
    """It ends with the end token after the token that completes the text, in a batch of any size."""
    model, requests = sharp_llama(), make_requests()
    whole = [sample.token_ids for sample in get_sampler("padded", model, END, SETTINGS, 64).sample(requests)]

    class Letters:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(map(chr, row)) for row in rows]

    stop = chr(whole[0][3]) + chr(whole[0][4])
    settings = dataclasses.replace(SETTINGS, stop=(stop, chr(whole[1][2])))
    cut = [
        next(
            (
                ids[:n] + [END[0]]
                for n in range(len(ids))
                if any(t in "".join(map(chr, ids[:n])) for t in settings.stop)
            ),
            ids,
        )
        for ids in whole
    ]
    assert len(cut[0]) == 6 and len(cut[1]) == 4 and any(ids in cut for ids in whole)
    steps = []
    handle = model.register_forward_pre_hook(lambda *args: steps.append(1))
    for batch_size in (64, 3, 1):
        found = get_sampler("padded", model, END, settings, batch_size, Letters()).sample(requests)
        assert [sample.token_ids for sample in found] == cut
    steps.clear()
    get_sampler("padded", model, END, settings, 64, Letters()).sample(requests[:2])
    assert len(steps) == 5
    handle.remove()


def make_mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(
        **{k: v for k, v in make_llama().config.to_dict().items() if k != "model_type"}, sliding_window=window
    )
    model = MistralForCausalLM(config)
    model.lm_head.weight.data.mul_(8)
    return model
