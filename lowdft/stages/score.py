"""score: the frozen base scores the training negatives, once -> reference.parquet (objectives without one: nothing)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lowdft.logps import Group, choose_layout, proposal_logps
from lowdft.parts import make_in_parts
from lowdft.passes import Passes
from lowdft.reference import negative_logps
from lowdft.run import Run, say


def needed(run: Run) -> bool:
    """Does this run take its reference from a file?"""
    return "reference" in run.objective.needs and run.args.reference == "precomputed"


def main(run: Run) -> None:
    """Scores every negative under the base as training will: in packed rows, `tokens_per_pass` tokens at a time."""
    if not needed(run):
        return
    product = run.reference
    if product.is_done():
        say(f"{product.path}: already there")
        return
    rows = run.encoded("train")
    model = run.base()
    args, section = run.args, run.recipe.negatives
    passes = Passes(args.layout or choose_layout(model), args.logits_chunk_size, args.tokens_per_pass)
    if args.reference_prompt == "proposal":
        sampler = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
        passes.head_logps = partial(proposal_logps, chunk_size=args.logits_chunk_size, **sampler)
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    make_in_parts(
        product,
        rows,
        part_size=4 * args.per_device_train_batch_size,
        work=lambda part: score_rows(model, part, prompt, passes),
        what="reference",
    )
    say(f"{product.path}: {len(rows)} rows scored")


def score_rows(model, rows: Sequence[dict], prompt: str, passes: Passes) -> list[dict]:
    """Per row its id and `ref_negative_logps`, in the order of its negatives."""
    out = []
    for count in sorted({len(row["negative_ids"]) for row in rows}):
        alike = [row for row in rows if len(row["negative_ids"]) == count]
        logps = negative_logps(model, [Group(row[prompt], row["negative_ids"]) for row in alike], passes).tolist()
        out += zip(alike, logps, strict=True)
    scored = {row["example_id"]: logps for row, logps in out}
    return [{"example_id": row["example_id"], "ref_negative_logps": scored[row["example_id"]]} for row in rows]
