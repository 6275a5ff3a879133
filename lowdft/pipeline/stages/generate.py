"""generate: samples negatives for every prompt from the base -> negatives.parquet, heldout_negatives.parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import torch
from huggingface_hub import DatasetCardData

from lowdft import models
from lowdft.config.sections import NegativesSection
from lowdft.data import Example
from lowdft.data.prompting import other_form, plain_text
from lowdft.distributed import collectives
from lowdft.pipeline import hub
from lowdft.pipeline.chunked_job import make_in_parts, part_size
from lowdft.pipeline.context import SPLITS, Run, say
from lowdft.pipeline.negatives import negatives_sampler, write_negatives
from lowdft.reporting import markdown, model_card
from lowdft.sampling import Sampler, VllmModel


def main(run: Run, push_data: str | None = None) -> None:
    """Writes the negatives that are needed and missing, and reports statistics about them.

    `push_data`: a Hub data set to upload the training rows' negatives to.
    """
    todo = [split for split in SPLITS if _wanted(run, split)]
    if run.ready_negatives() and run.examples("train"):
        say("negatives: the rows have their own")
    sampler = None
    for split in todo:
        if sampler is None or run.recipe.negatives.adapter:
            sampler = None  # frees the last model before the next one is loaded
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
        for warning in filter(None, (form_warning(facts), mostly_cut(facts, section.max_new_tokens))):
            say(f"warning: {warning}")
    if not run.ready_negatives() and collectives.rank() == 0:
        push(run, push_data or (run.recipe.negatives.push if run.push_negatives else None))


def samples_per_part(section: NegativesSection) -> int:
    """Samples per part file, the most that an interruption loses; more for vLLM, which schedules its own batches."""
    if section.backend == "vllm":
        return 8192
    usual, given = 2048 if torch.cuda.is_available() else 128, 2 * (section.batch_size or 0)
    return max(usual, given) if section.backend == "continuous" else given or usual


def count(table: pa.Table) -> dict[str, int]:
    """Counts all negatives, and those that are empty, equal the completion, repeat another or reach the length limit.

    With `negatives.keep: wrong`, also how many answers were right at first, and how many of them were replaced by a
    wrong answer of the same row (`wrong_ones_used_again`) or another row's completion (`completions_of_other_rows`).
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
    """A warning if most negatives have a different form than their completions."""
    different, total = facts.get("of_another_form", 0), facts["negatives"]
    if 2 * different <= total:
        return None
    return (
        f"{different} of {total} negatives have a different form than their completion (over 3 times longer or "
        "shorter, or different line breaks): the model can tell them apart by form alone, so they teach little. Try "
        "negatives.strategy: few_shot, negatives.stop, or another negatives.max_new_tokens."
    )


def mostly_cut(facts: dict[str, int], max_new_tokens: int) -> str | None:
    """A warning if more than half of the negatives reached the length limit, so that they have no end token."""
    cut, total = facts["cut_at_max_new_tokens"], facts["negatives"]
    if 2 * cut <= total:
        return None
    return (
        f"{cut} of {total} negatives were cut at negatives.max_new_tokens={max_new_tokens}, so they do not end like "
        "the completions, and the model learns that difference. Raise the limit, or set negatives.stop to a text at "
        "which negatives end (a base without instruction tuning rarely ends its answers)."
    )


def push(run: Run, name: str | None) -> None:
    """Uploads the training negatives as a Hub data set, private unless `negatives.private` is false.

    Nothing is uploaded without a name on the command line; `negatives.push` alone only prints the command.
    """
    section = run.recipe.negatives
    if name is None:
        if section.push:
            say(f"nothing was uploaded; to upload the negatives: lowdft generate {run.folder} --push {section.push}")
        return
    card = DatasetCardData(tags=["lowdft", "dft", "negatives"], task_categories=["text-generation"])
    base = models.public_name(run.source, run.recipe.model)
    words = f"Negatives sampled from {markdown.code(base)}: {model_card.sampling_words(section)}."
    readme = f"---\n{card.to_yaml()}\n---\n\n# {markdown.plain(name)}\n\n{words}\n"
    files = [hub.Upload("data/train.parquet", run.negatives("train").path), hub.Upload("README.md", readme.encode())]
    say(f"uploading to {name}:\n{hub.listing(files)}")
    say(f"pushed to {hub.push(files, name, section.private, 'dataset')}; the uploaded files are identical")


def _part(run: Run, sampler: Sampler, per_prompt: int, examples: Sequence[Example]) -> list[dict]:
    return write_negatives(run, sampler, examples, per_prompt)


def _wanted(run: Run, split: str) -> bool:
    if run.ready_negatives(split) or not run.examples(split) or not run.negatives_wanted(split):
        return False
    product = run.negatives(split)
    if collectives.from_all(product.is_done())[0]:
        say(f"{product.path}: already exists")
        return False
    return True


def _sampler(run: Run, adapter: str | None) -> Sampler:
    backend = run.recipe.negatives.backend
    if backend == "vllm":
        model = _vllm_model(run, adapter)
    else:
        model = models.load_adapter(run.base(), adapter) if adapter else run.base()
    return negatives_sampler(run, model, backend)


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
