"""generate: the base writes negatives for every prompt -> negatives.parquet (and those of the held-out rows)."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa

from lowdft import models
from lowdft.data import Example
from lowdft.data.prompting import other_form, plain_text, shot_stop
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.pipeline.chunked_job import make_in_parts
from lowdft.pipeline.context import SPLITS, Run, say, truth_of
from lowdft.sampling import Request, Sample, Sampler, SamplingSettings, get_sampler


def main(run: Run) -> None:
    """Writes the negatives that are wanted and not there yet; tells how they ended."""
    todo = [split for split in SPLITS if _wanted(run, split)]
    if run.ready_negatives() and run.examples("train"):
        say("negatives: the rows bring their own")
    sampler = None
    for split in todo:
        if sampler is None or run.recipe.negatives.adapter:
            sampler = _sampler(run, run.recipe.negatives.adapter if split == "train" else None)
        product, section = run.negatives(split), run.recipe.negatives
        examples = run.examples(split)
        facts = make_in_parts(
            product,
            examples,
            part_size=max(1, 2 * section.batch_size // run.negatives_wanted(split)),
            work=partial(_part, run, sampler, run.negatives_wanted(split)),
            what=f"negatives, {split}",
            count=count,
        )
        say(f"{product.path}: " + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items()))
        if warning := form_warning(facts):
            say(f"warning: {warning}")
    if run.recipe.negatives.push and not run.ready_negatives() and collectives.rank() == 0:
        push(run)


def write_negatives(run: Run, sampler: Sampler, examples: Sequence[Example], per_prompt: int) -> list[dict]:
    """One row an example: its id, text and `per_prompt` negatives with ids, finish reasons and seeds.

    A sample's seed depends on the recipe's seed, the example's id and the sample's number alone. Up to
    `negatives.resample` times, a negative that is empty, equals the completion or, with `negatives.keep: wrong`, is a
    right answer is replaced under a new seed. Right ones that are left are then not negatives: see `only_wrong`.
    """
    section, is_right = run.recipe.negatives, _judge(run)
    stop = [*section.stop, *(_shot_stop(run) if section.strategy == "few_shot" else [])]
    prompts = {e.example_id: run.sampling_ids(e) for e in examples}
    by_id = {e.example_id: e for e in examples}
    seeds = {(e.example_id, k): seed_of(section.seed, e.example_id, k, 0) for e in examples for k in range(per_prompt)}
    samples, texts, first_right = {}, {}, set()
    pending = list(seeds)
    for attempt in range(section.resample + 1):
        seeds |= {key: seed_of(section.seed, *key, attempt) for key in pending}
        drawn = sampler.sample([Request(prompts[key[0]], seeds[key]) for key in pending])
        for key, sample in zip(pending, drawn, strict=True):
            samples[key] = end_at(stop, sample, run.tokenizer)
            texts[key] = run.tokenizer.decode(samples[key].token_ids, skip_special_tokens=True).strip()
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


def only_wrong(run: Run, example: Example, row: dict, is_right: Callable[[str, Example], bool]) -> None:
    """Puts wrong answers in the place of right ones, and counts them in `replaced`.

    The row's own wrong answers are used again, in turn. Where it has none, a completion of another training row that
    is no right answer here stands in: it has the right form, and an objective loses nothing of the row's completion.
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
            f"{example.source}: all answers that the base wrote are right, and so is every other row's completion; "
            "negatives.keep: wrong needs a wrong one. Use negatives.keep: all, or leave this row out."
        )
    ids = run.encoder.completion(example.prompt, other.completion, example.tools)
    text = plain_text(other.completion).strip()
    row["negatives"] = [text] * row["replaced"]
    row["negative_ids"], row["finish_reasons"] = [list(ids)] * row["replaced"], ["stop"] * row["replaced"]


def _others(run: Run, example: Example) -> list[Example]:
    """The training rows of the example's form in an order drawn by its id."""
    rows = [e for e in run.examples("train") if isinstance(e.completion, str) == isinstance(example.completion, str)]
    random.Random(seed_of(run.recipe.negatives.seed, example.example_id, 0, 0)).shuffle(rows)
    return rows


def _judge(run: Run) -> Callable[[str, Example], bool]:
    """Is an answer right for an example? Never, with `negatives.keep: all`."""
    if run.recipe.negatives.keep == "all":
        return lambda text, example: False
    check = run.right_answer
    return lambda text, example: check(text, truth_of(example))


def _shot_stop(run: Run) -> list[str]:
    return shot_stop([example.completion for example in run.examples("train")])


def end_at(stop: Sequence[str], sample: Sample, tokenizer) -> Sample:
    """The sample as an answer that ends before the first token with which it contains one of the texts."""

    def contains(n: int) -> bool:
        text = tokenizer.decode(sample.token_ids[:n], skip_special_tokens=True)
        return any(one in text for one in stop)

    if not (stop and contains(len(sample.token_ids))):
        return sample
    first = next(n for n in range(len(sample.token_ids)) if contains(n + 1))
    return Sample([*sample.token_ids[:first], tokenizer.eos_token_id], "stop")


def seed_of(seed: int, example_id: str, k: int, attempt: int) -> int:
    """A 63-bit seed for one sample, the same on every machine."""
    key = json.dumps([seed, example_id, k, attempt]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def count(table: pa.Table) -> dict[str, int]:
    """How many negatives there are, are empty, equal the completion, repeat one another, or hit the length cap.

    With `negatives.keep: wrong` also how many answers were right at first, and how many of them a wrong answer of the
    same row (`wrong_ones_used_again`) or another row's completion (`completions_of_other_rows`) replaces.
    """
    totals = Counter(negatives=0, empty=0, equal_to_the_completion=0, repeated=0, cut_at_max_new_tokens=0)
    kept_wrong = "right_at_first" in table.column_names
    columns = ["completion", "negatives", "finish_reasons"]
    for row in table.select(columns + (["right_at_first", "replaced", "stand_ins"] if kept_wrong else [])).to_pylist():
        totals["negatives"] += len(row["negatives"])
        totals["empty"] += row["negatives"].count("")
        totals["equal_to_the_completion"] += row["negatives"].count(plain_text(row["completion"]).strip())
        totals["repeated"] += len(row["negatives"]) - len(set(row["negatives"]))
        totals["cut_at_max_new_tokens"] += row["finish_reasons"].count("length")
        totals["of_another_form"] += sum(other_form(plain_text(row["completion"]), n) for n in row["negatives"] if n)
        if kept_wrong:
            totals["right_at_first"] += row["right_at_first"]
            totals["wrong_ones_used_again"] += row["replaced"] - row["stand_ins"]
            totals["completions_of_other_rows"] += row["stand_ins"]
    return dict(totals)


def form_warning(facts: dict[str, int]) -> str | None:
    """One line when most negatives are of another form than their completions, else None."""
    different, total = facts.get("of_another_form", 0), facts["negatives"]
    if 2 * different <= total:
        return None
    return (
        f"{different} of {total} negatives are of another form than their completion (over 3 times longer or shorter, "
        "or with line breaks where it has none): the model tells them apart by form alone, so they teach little. Try "
        "negatives.strategy: few_shot, negatives.stop, or another negatives.max_new_tokens."
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
    model = run.source if section.backend == "vllm" else run.base()
    if adapter:
        model = models.load_adapter(model, adapter)
    return get_sampler(section.backend, model, models.end_ids(run.tokenizer, model), settings, section.batch_size)
