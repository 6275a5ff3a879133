"""Samples negatives for rows, samples some of them again, and replaces right answers."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence

from lowdft.data import Example
from lowdft.data.prompting import plain_text, shot_stop
from lowdft.errors import InvalidRequests, UserError
from lowdft.pipeline.context import Run, truth_of
from lowdft.sampling import Request, Sample, Sampler, SamplingSettings, get_sampler


def negatives_sampler(run: Run, model, backend: str) -> Sampler:
    """A sampler with the recipe's settings for negatives.

    Args:
        model: the base, with or without an adapter; for the backend vllm a `VllmModel`.
    """
    section = run.recipe.negatives
    settings = SamplingSettings(
        section.temperature, section.top_p, section.top_k, section.max_new_tokens, stop_texts(run)
    )
    return get_sampler(backend, model, run.encoder.end_ids, settings, section.batch_size, run.tokenizer)


@functools.lru_cache(maxsize=1)  # asked for every part, and few_shot reads all training rows
def stop_texts(run: Run) -> tuple[str, ...]:
    """The texts before which a negative ends: `negatives.stop`, and with few_shot what separates the shots."""
    section = run.recipe.negatives
    if section.strategy != "few_shot":
        return tuple(section.stop)
    return (*section.stop, *shot_stop([example.completion for example in run.examples("train")]))


def write_negatives(run: Run, sampler: Sampler, examples: Sequence[Example], per_prompt: int) -> list[dict]:
    """One row per example: its id, text and `per_prompt` negatives with ids, finish reasons and seeds.

    A sample's seed depends only on the recipe's seed, the example's id and the number of the sample. A negative that is
    empty, equals the completion or, with `negatives.keep: wrong`, is a right answer is sampled again with a new seed,
    up to `negatives.resample` times. Right answers that are left are replaced by `only_wrong`.
    """
    section, is_right = run.recipe.negatives, _judge(run)
    stop = stop_texts(run)
    prompts = {e.example_id: run.sampling_ids(e) for e in examples}
    by_id = {e.example_id: e for e in examples}
    ends = {e.example_id: run.encoder.turns.end_for(e.completion) for e in examples}
    seeds = {(e.example_id, k): seed_of(section.seed, e.example_id, k, 0) for e in examples for k in range(per_prompt)}
    samples, texts, first_right = {}, {}, set()
    pending = list(seeds)
    for attempt in range(section.resample + 1):
        seeds |= {key: seed_of(section.seed, *key, attempt) for key in pending}
        drawn = _drawn(sampler, [Request(prompts[key[0]], seeds[key]) for key in pending], [k[0] for k in pending])
        for key, sample in zip(pending, drawn, strict=True):
            samples[key] = end_at(stop, sample, run.tokenizer, ends[key[0]])
            texts[key] = run.encoder.text(samples[key].token_ids)
        right = {key for key in pending if is_right(texts[key], by_id[key[0]])}
        first_right |= right if attempt == 0 else set()
        pending = [k for k in pending if k in right or texts[k] in ("", plain_text(by_id[k[0]].completion).strip())]
        if not pending:
            break
    rows = []
    for example in examples:
        keys = [(example.example_id, k) for k in range(per_prompt)]
        row = {
            "example_id": example.example_id,
            "prompt": example.prompt,
            "completion": example.completion,
            "negatives": [texts[key] for key in keys],
            "negative_ids": [list(samples[key].token_ids) for key in keys],
            "finish_reasons": [samples[key].finish_reason for key in keys],
            "seeds": [seeds[key] for key in keys],
        }
        if section.keep == "wrong":
            only_wrong(run, example, row, is_right)
            row["right_at_first"] = sum(key in first_right for key in keys)
        rows.append(row)
    return rows


def _drawn(sampler: Sampler, requests: Sequence[Request], names: Sequence[str]) -> list[Sample]:
    """Samples answers; an error names the examples."""
    try:
        return sampler.sample(requests)
    except InvalidRequests as error:
        found = list(dict.fromkeys(names[i] for i in error.numbers))
        shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise UserError(f"negatives of {len(found)} rows (example_id {shown}): {error}") from error


def only_wrong(run: Run, example: Example, row: dict, is_right: Callable[[str, Example], bool]) -> None:
    """Replaces right answers by wrong ones, and counts them in `replaced`.

    The row's wrong answers are used again, in turn. If it has none, the completion of another training row that is not
    a right answer here is used: it has the right form and does not contradict the row's completion.
    """
    wrong = [k for k, text in enumerate(row["negatives"]) if not is_right(text, example)]
    row["replaced"] = len(row["negatives"]) - len(wrong)
    row["stand_ins"] = 0 if wrong else row["replaced"]
    lists = ("negatives", "negative_ids", "finish_reasons", "seeds")
    if wrong:
        places = iter(itertools.cycle(wrong))
        order = [k if k in wrong else next(places) for k in range(len(row["negatives"]))]
        row |= {name: [row[name][k] for k in order] for name in lists}
        return
    other = next((e for e in _others(run, example) if not is_right(plain_text(e.completion), example)), None)
    if other is None:
        raise UserError(
            f"{example.source}: all answers that the base wrote are right, and so are the completions of all other "
            "rows, but negatives.keep: wrong needs a wrong one. Use negatives.keep: all, or remove this row."
        )
    ids = run.encoder.completion(example.prompt, other.completion, example.tools)
    text = plain_text(other.completion).strip()
    row["negatives"] = [text] * row["replaced"]
    row["negative_ids"], row["finish_reasons"] = [list(ids)] * row["replaced"], ["stop"] * row["replaced"]


def _others(run: Run, example: Example) -> list[Example]:
    """The training rows of the example's form, in a random order determined by its id."""
    rows = [e for e in run.examples("train") if isinstance(e.completion, str) == isinstance(example.completion, str)]
    random.Random(seed_of(run.recipe.negatives.seed, example.example_id, 0, 0)).shuffle(rows)
    return rows


def _judge(run: Run) -> Callable[[str, Example], bool]:
    """Whether an answer is right for an example; always False with `negatives.keep: all`."""
    if run.recipe.negatives.keep == "all":
        return lambda text, example: False
    check = run.right_answer
    return lambda text, example: check(text, truth_of(example))


def end_at(stop: Sequence[str], sample: Sample, tokenizer, end: int) -> Sample:
    """The sample, ended with token `end` before the first token that completes one of the texts."""

    def contains(n: int) -> bool:
        text = tokenizer.decode(sample.token_ids[:n], skip_special_tokens=True)
        return any(one in text for one in stop)

    if not (stop and contains(len(sample.token_ids))):
        return sample
    first = next(n for n in range(len(sample.token_ids)) if contains(n + 1))
    return Sample([*sample.token_ids[:first], end], "stop")


def seed_of(seed: int, example_id: str, k: int, attempt: int) -> int:
    """A 63-bit seed for one sample, the same on every machine."""
    key = json.dumps([seed, example_id, k, attempt]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
