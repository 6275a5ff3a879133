"""generate: the base writes negatives for every prompt -> negatives.parquet (and those of the held-out rows)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import torch

from lowdft import models
from lowdft.config.sections import NegativesSection
from lowdft.data import Example
from lowdft.data.prompting import plain_text
from lowdft.distributed import collectives
from lowdft.pipeline.chunked_job import make_in_parts, part_size
from lowdft.pipeline.context import SPLITS, Run, say
from lowdft.sampling import Request, Sample, Sampler, SamplingSettings, VllmModel, get_sampler


def main(run: Run) -> None:
    """Writes the negatives that are wanted and not there yet; tells how they ended."""
    todo = [split for split in SPLITS if _wanted(run, split)]
    if run.ready_negatives() and run.examples("train"):
        say("negatives: the rows bring their own")
    sampler = None
    for split in todo:
        if sampler is None or run.recipe.negatives.adapter:
            sampler = None  # no name keeps the last model while the next one is loaded
            models.release_memory()
            sampler = _sampler(run, run.recipe.negatives.adapter if split == "train" else None)
        product, section = run.negatives(split), run.recipe.negatives
        examples = run.examples(split)
        facts = make_in_parts(
            product,
            examples,
            part_size=part_size(len(examples), samples_per_part(section) // run.negatives_wanted(split)),
            work=partial(_part, run, sampler, run.negatives_wanted(split)),
            what=f"negatives, {split}",
            count=count,
        )
        say(f"{product.path}: " + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items()))
        if warning := mostly_cut(facts, section.max_new_tokens):
            say(f"warning: {warning}")
    if run.recipe.negatives.push and not run.ready_negatives() and collectives.rank() == 0:
        if run.push_negatives:
            push(run)
        else:
            say(f"not uploaded to {run.recipe.negatives.push}: negatives.push acts with --push-negatives alone")


def write_negatives(run: Run, sampler: Sampler, examples: Sequence[Example], per_prompt: int) -> list[dict]:
    """One row an example: its id, text and `per_prompt` negatives with ids, finish reasons and seeds.

    A sample's seed depends on the recipe's seed, the example's id and the sample's number alone. Up to
    `negatives.resample` times, a negative that is empty or equals the completion is replaced under a new seed.
    """
    section = run.recipe.negatives
    prompts = {e.example_id: run.sampling_ids(e) for e in examples}
    seeds = {(e.example_id, k): seed_of(section.seed, e.example_id, k, 0) for e in examples for k in range(per_prompt)}
    answers = {e.example_id: plain_text(e.completion).strip() for e in examples}
    ends = {e.example_id: run.encoder.turns.end_for(e.completion) for e in examples}
    samples = {}
    pending = list(seeds)
    for attempt in range(section.resample + 1):
        seeds |= {key: seed_of(section.seed, *key, attempt) for key in pending}
        drawn = sampler.sample([Request(prompts[key[0]], seeds[key]) for key in pending])
        for key, sample in zip(pending, drawn, strict=True):
            sample = end_at(section.stop, sample, run.tokenizer, ends[key[0]])
            samples[key] = (sample, run.encoder.text(sample.token_ids))
        pending = [key for key in pending if samples[key][1] in ("", answers[key[0]])]
        if not pending:
            break
    rows = []
    for example in examples:
        keys = [(example.example_id, k) for k in range(per_prompt)]
        rows.append(
            {
                "example_id": example.example_id,
                "prompt": example.prompt,
                "completion": example.completion,
                "negatives": [samples[key][1] for key in keys],
                "negative_ids": [list(samples[key][0].token_ids) for key in keys],
                "finish_reasons": [samples[key][0].finish_reason for key in keys],
                "seeds": [seeds[key] for key in keys],
            }
        )
    return rows


def samples_per_part(section: NegativesSection) -> int:
    """Samples between two files, which an interruption loses at most; vLLM schedules by itself and takes many."""
    if section.backend == "vllm":
        return 8192
    if section.batch_size:
        return 2 * section.batch_size
    return 2048 if torch.cuda.is_available() else 128


def end_at(stop: Sequence[str], sample: Sample, tokenizer, end: int) -> Sample:
    """The sample as an answer that ends, with token `end`, before the first token that completes one of the texts."""

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


def count(table: pa.Table) -> dict[str, int]:
    """How many negatives there are, are empty, equal the completion, repeat one another, or hit the length cap."""
    totals = Counter(negatives=0, empty=0, equal_to_the_completion=0, repeated=0, cut_at_max_new_tokens=0)
    for row in table.select(["completion", "negatives", "finish_reasons"]).to_pylist():
        totals["negatives"] += len(row["negatives"])
        totals["empty"] += row["negatives"].count("")
        totals["equal_to_the_completion"] += row["negatives"].count(plain_text(row["completion"]).strip())
        totals["repeated"] += len(row["negatives"]) - len(set(row["negatives"]))
        totals["cut_at_max_new_tokens"] += row["finish_reasons"].count("length")
    return dict(totals)


def mostly_cut(facts: dict[str, int], max_new_tokens: int) -> str | None:
    """What to say when more than half of the negatives hit the length cap, so that they have no end token."""
    cut, total = facts["cut_at_max_new_tokens"], facts["negatives"]
    if 2 * cut <= total:
        return None
    return (
        f"{cut} of {total} negatives were cut at negatives.max_new_tokens={max_new_tokens}, so they do not end as the "
        "completions do, and that difference is trained. Raise it, or set negatives.stop to a text at which they end "
        "(a base without instruction tuning rarely ends by itself)."
    )


def push(run: Run) -> None:
    """Uploads the training negatives as a Hub data set, private unless `negatives.private` says otherwise."""
    from datasets import Dataset

    section = run.recipe.negatives
    Dataset.from_parquet(str(run.negatives("train").path)).push_to_hub(section.push, private=section.private)
    say(f"pushed the negatives to {section.push}")


def _part(run: Run, sampler: Sampler, per_prompt: int, examples: Sequence[Example]) -> list[dict]:
    return write_negatives(run, sampler, examples, per_prompt)


def _wanted(run: Run, split: str) -> bool:
    if run.ready_negatives(split) or not run.examples(split) or not run.negatives_wanted(split):
        return False
    product = run.negatives(split)
    if collectives.from_all(product.is_done())[0]:
        say(f"{product.path}: already there")
        return False
    return True


def _sampler(run: Run, adapter: str | None) -> Sampler:
    section = run.recipe.negatives
    settings = SamplingSettings(section.temperature, section.top_p, section.top_k, section.max_new_tokens)
    if section.backend == "vllm":
        model = _vllm_model(run, adapter)
    else:
        model = models.load_adapter(run.base(), adapter) if adapter else run.base()
    return get_sampler(section.backend, model, run.encoder.end_ids, settings, section.batch_size)


def _vllm_model(run: Run, adapter: str | None) -> VllmModel:
    section, longest = run.recipe.model, run.encoder.prompt_limit
    if adapter:
        models.require_adapter(adapter, "negatives.adapter")
    return VllmModel(
        path=run.source.path,
        revision=run.source.revision,
        dtype=section.dtype,
        load_in_4bit=section.load_in_4bit,
        max_length=longest + run.recipe.negatives.max_new_tokens if longest else None,
        memory=run.recipe.negatives.gpu_memory_utilization,
        adapter=adapter,
        trust_remote_code=section.trust_remote_code,
    )
