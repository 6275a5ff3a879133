"""score: the frozen base scores the training negatives, once -> reference.parquet (objectives without one: nothing)."""

from __future__ import annotations

from collections.abc import Sequence

from lowdft.logps import Group, choose_layout
from lowdft.parts import make_in_parts
from lowdft.reference import negative_logps
from lowdft.run import Run, say


def needed(run: Run) -> bool:
    """Does this run take its reference from a file?"""
    return "reference" in run.objective.needs and run.args.reference == "precomputed"


def main(run: Run) -> None:
    """Scores every negative under the base, laid out as training will lay it out: B negatives of a visit in a row."""
    if not needed(run):
        return
    product = run.reference
    if product.is_done():
        say(f"{product.path}: already there")
        return
    rows = run.encoded("train")
    model = run.base()
    layout = run.args.layout or choose_layout(model)
    make_in_parts(
        product,
        rows,
        part_size=4 * run.args.per_device_train_batch_size,
        work=lambda part: score_rows(run, model, layout, part),
        what="reference",
    )
    say(f"{product.path}: {len(rows)} rows scored")


def score_rows(run: Run, model, layout: str, rows: Sequence[dict]) -> list[dict]:
    """Per row its id and `ref_negative_logps`, in the order of its negatives."""
    args, section = run.args, run.recipe.negatives
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    proposal = None
    if args.reference_prompt == "proposal":
        proposal = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
    groups, owners = [], []
    for i, row in enumerate(rows):
        ids = row["negative_ids"]
        for start in range(0, len(ids), args.negatives_per_step):
            groups.append(Group(row[prompt], ids[start : start + args.negatives_per_step]))
            owners.append(i)
    scored: list[list[float]] = [[] for _ in rows]
    size = args.per_device_train_batch_size
    for start in range(0, len(groups), size):
        batch = groups[start : start + size]
        logps = iter(negative_logps(model, batch, layout, args.logits_chunk_size, proposal).float().tolist())
        for group, owner in zip(batch, owners[start : start + size], strict=True):
            scored[owner] += [next(logps) for _ in group.completions]
    return [
        {"example_id": row["example_id"], "ref_negative_logps": logps} for row, logps in zip(rows, scored, strict=True)
    ]
