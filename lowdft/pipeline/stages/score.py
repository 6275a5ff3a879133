"""score: scores the training negatives once with the frozen base, if the objective needs it -> reference.parquet."""

from __future__ import annotations

from functools import partial

from lowdft import models
from lowdft.data.encoded import EncodedRows
from lowdft.data.prepare import with_mismatched
from lowdft.distributed import collectives
from lowdft.logprobs import choose_layout, proposal_logps
from lowdft.logprobs.check import require_finite
from lowdft.models.reference import NOT_FINITE, reference_fields, reference_group, reference_logps
from lowdft.pipeline.chunked_job import make_in_parts, part_size
from lowdft.pipeline.context import Run, say
from lowdft.training.token_budget import Passes


def main(run: Run) -> None:
    """Scores what the objective needs with the base, in the same way as training (packed, within `tokens_per_pass`)."""
    if not run.reference_from_file:
        return
    product = run.reference
    if collectives.from_all(product.is_done())[0]:
        say(f"{product.path}: already exists")
        return
    rows = run.encoded("train")
    if run.objective.uses_mismatched:
        rows = with_mismatched(rows, run.encoder.max_length)
    model = run.base()
    if run.args.reference_adapter:
        model = models.load_adapter(model, run.args.reference_adapter)
    args, section = run.args, run.recipe.negatives
    passes = Passes(choose_layout(model, args.layout), args.logits_chunk_size, args.tokens_per_pass)
    if args.reference_prompt == "proposal":
        sampler = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
        passes.head_logps = partial(proposal_logps, chunk_size=args.logits_chunk_size, **sampler)
    make_in_parts(
        product,
        rows,
        part_size=part_size(len(rows), 4 * args.per_device_train_batch_size),
        work=lambda part: score_rows(run, model, part, passes),
        what="reference",
        noted={"negatives": run.negatives_content},
    )
    say(f"{product.path}: {len(rows)} rows scored")


def score_rows(run: Run, model, rows: EncodedRows, passes: Passes) -> list[dict]:
    """Per row, its id and those of `ref_negative_logps` and `ref_logps` that the objective needs."""
    groups = {row["example_id"]: reference_group(row, run.objective, run.args) for row in rows}
    scored = []
    for count in sorted({len(group.completions) for group in groups.values()}):
        alike = {name: group for name, group in groups.items() if len(group.completions) == count}
        logps_MK = reference_logps(model, list(alike.values()), passes)
        require_finite("the reference's log-probabilities", list(alike), list(logps_MK), NOT_FINITE)
        scored += zip(alike, logps_MK.tolist(), strict=True)
    return [{"example_id": name, **reference_fields(logps, run.objective)} for name, logps in scored]
