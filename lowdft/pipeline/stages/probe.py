"""probe: estimates before training whether negatives will help on these rows, and which objective -> probe.json"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdft import models, objectives
from lowdft.config.sections import AdapterSection
from lowdft.data import Example
from lowdft.data.prompting import plain_text
from lowdft.errors import UserError
from lowdft.evaluation import answers
from lowdft.evaluation import probe as measures
from lowdft.evaluation.probe import Gain, Method
from lowdft.files import write_json
from lowdft.logprobs import choose_layout
from lowdft.models.reference import reference_on
from lowdft.pipeline.context import Run, say, truth_of
from lowdft.pipeline.negatives import negatives_sampler, write_negatives
from lowdft.training.token_budget import Passes

STEPS, SAMPLES = 15, 8
TOLD = {
    "share_right": "sampled answers that are right",
    "coverage": "share of a row's wrong answers covered by its samples (Good-Turing)",
    "outscored_before": "held-out rows with a wrong answer likelier than the completion, base",
    "outscored_after": "the same after {steps} steps of SFT",
    "lead_after": "lead of that wrong answer, nats",
    "drift": "drop of the negatives' log-prob in {steps} steps of SFT, nats",
    "half_weight": "drop that halves DFT's weights (d*), nats",
}
SHARES = ("share_right", "coverage", "outscored_before", "outscored_after")


def main(run: Run, rows: int = 128, steps: int = STEPS) -> dict:
    """Probes on `rows` training rows and as many held-out rows; prints numbers and verdict, and writes probe.json.

    Raises:
        UserError: there are too few rows, or the probe cannot run the objective.
    """
    found = probe(run, rows, steps)
    _print(found)
    write_json(run.folder / "probe.json", found)
    say(f"{run.folder / 'probe.json'}: {found['objective']} is recommended")
    return found


def probe(run: Run, rows: int, steps: int) -> dict:
    """The contents of probe.json: the counts and shares of `TOLD`, the gains by method, `objective` and `why`."""
    train, heldout = _choose(run, rows)
    model, encoded, texts = _prepare(run, [train, heldout])
    args, count = run.args, min(SAMPLES, max(len(row["negative_ids"]) for part in encoded for row in part))
    passes = Passes(choose_layout(model, args.layout), args.logits_chunk_size, args.tokens_per_pass)
    methods = _methods(run, count)
    ref_MK = measures.reference_logps(model, encoded[0], count, passes)
    before_MK = measures.summed_logps(model, encoded[1], count, passes)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    say(f"{steps} steps of SFT on {len(encoded[0])} rows, then one gradient of {', '.join(m.name for m in methods)}")
    measures.teach(model, encoded[0], steps, batch, args.learning_rate, passes)
    train_MK = measures.summed_logps(model, encoded[0], count, passes)
    after_MK = measures.summed_logps(model, encoded[1], count, passes)
    gains = measures.gradient_test(model, *encoded, methods, count, passes, ref_MK)
    dft = _dft(run)
    found = {
        "rows": [len(train), len(heldout)],
        "negatives": count,
        "steps": steps,
        "outscored_before": measures.outscored(before_MK)[0],
        "drift": float((ref_MK - train_MK)[:, :-1].mean()),
        "half_weight": measures.half_weight(dft["gamma"], 0.0 if isinstance(args.log_u_init, str) else args.log_u_init),
    }
    found["outscored_after"], found["lead_after"] = measures.outscored(after_MK)
    found |= _of_samples(run, [*train, *heldout], texts)
    found["objective"], found["why"] = measures.recommend(found, gains)
    return found | {"gains": {name: dataclasses.asdict(gain) for name, gain in gains.items()}}


def _choose(run: Run, rows: int) -> tuple[list[Example], list[Example]]:
    """The first training rows and the first held-out rows (or the last training rows, if none are held out)."""
    train, heldout = run.examples("train"), run.examples("heldout")
    if not heldout:
        half = len(train) // 2
        train, heldout = train[:-half], train[-half:]
    if min(len(train), len(heldout)) < 2 * measures.BLOCKS:
        raise UserError(
            f"{len(train)} training and {len(heldout)} held-out rows are too few for a probe; wanted "
            f"{2 * measures.BLOCKS} of each"
        )
    return train[:rows], heldout[:rows]


def _methods(run: Run, count: int) -> list[Method]:
    """SFT, listwise on all negatives, DFT on B of them, and the recipe's objective if it is another one."""
    own, args = run.objective, run.args
    methods = [Method("sft", {}, 0), Method("listwise", dict(objectives.get("listwise").defaults), count)]
    methods.append(Method("dft", _dft(run), min(count, args.negatives_per_step)))
    if own.name not in [method.name for method in methods]:
        if own.uses_mismatched or own.uses_predictions or own.uses_aligned or own.token_weight:
            raise UserError(f"training.objective is {own.name}, which the probe cannot run; probe with listwise")
        negatives = min(count, args.negatives_per_step) if own.uses_negatives else 0
        methods.append(Method(own.name, args.hyperparameters(), negatives))
    if own.name == "listwise":
        methods[1] = Method("listwise", args.hyperparameters(), count)
    return methods


def _dft(run: Run) -> dict:
    if run.objective.name == "dft":
        return run.args.hyperparameters()
    return dict(objectives.get("dft").defaults)


def _prepare(run: Run, parts: Sequence[Sequence[Example]]) -> tuple[torch.nn.Module, list[list[dict]], list | None]:
    """The base with a new adapter, the rows of both parts with their negatives, and the texts of sampled negatives."""
    section, written, texts = run.recipe.negatives, {}, {}
    wanting = [e for part, split in zip(parts, ("train", "heldout"), strict=True)
               if not run.ready_negatives(split) for e in part]  # fmt: skip
    model = run.base()
    if wanting and section.adapter:
        written, texts = _write(run, models.load_adapter(model, section.adapter), wanting)
        del model
        gc.collect()
        model = run.base()
    model = models.add_adapter(model, run.recipe.adapter or AdapterSection(), run.args.seed)
    if wanting and not section.adapter:
        with reference_on(model):
            written, texts = _write(run, model, wanting)
    encoded = [[_encode(run, example, written.get(example.example_id)) for example in part] for part in parts]
    lacking = [e.source for part, own in zip(parts, encoded, strict=True)
               for e, row in zip(part, own, strict=True) if not row["negative_ids"]]  # fmt: skip
    if lacking:
        raise UserError(
            f"{len(lacking)} rows have no negatives (first: {', '.join(lacking[:3])}); the probe needs at least one "
            "per row"
        )
    return model, encoded, texts


def _write(run: Run, model, examples: Sequence[Example]) -> tuple[dict, dict]:
    """`SAMPLES` negatives of every example: ids and texts by example_id."""
    sampler = negatives_sampler(run, model, "padded")
    say(f"sampling {SAMPLES} negatives for each of {len(examples)} rows")
    rows = write_negatives(run, sampler, examples, SAMPLES)
    return ({row["example_id"]: row["negative_ids"] for row in rows}, {r["example_id"]: r["negatives"] for r in rows})


def _encode(run: Run, example: Example, negative_ids: list[list[int]] | None) -> dict:
    row = run.encoder.row(
        {
            "prompt": example.prompt,
            "completion": example.completion,
            "tools": example.tools,
            "negatives": [] if negative_ids else example.negatives,
        }
    )
    if negative_ids:
        row["negative_ids"] = [run.encoder.fit(row["prompt_ids"], ids, "negatives") for ids in negative_ids if ids]
    return row


def _of_samples(run: Run, examples: Sequence[Example], texts: dict[str, list[str]]) -> dict:
    """The share of right answers and the coverage of samples; empty if the rows have their own negatives."""
    sampled = [(example, texts[example.example_id]) for example in examples if example.example_id in texts]
    if not sampled:
        return {}
    section = run.recipe.evaluation
    truths = [truth_of(example) for example in run.examples("train")]
    kind = answers.detect(truths) if section.answer == "auto" else section.answer
    if kind == "none":
        own = [[text for text in all_ if text != plain_text(e.completion).strip()] for e, all_ in sampled]
        return {"coverage": measures.coverage(own)}
    check = answers.checker(kind, section.pattern)
    wrong = [[text for text in all_ if not check(text, truth_of(example))] for example, all_ in sampled]
    found = {"coverage": measures.coverage(wrong)}
    if run.recipe.negatives.keep == "all":
        found["share_right"] = 1 - sum(map(len, wrong)) / sum(len(all_) for _, all_ in sampled)
    return found


def _print(found: dict) -> None:
    console, table = Console(), Table(title=f"probe on {found['rows'][0]} + {found['rows'][1]} rows, "
                                            f"{found['negatives']} negatives each", title_justify="left")  # fmt: skip
    table.add_column("")
    table.add_column("", justify="right")
    for key, text in TOLD.items():
        if key in found:
            value = f"{100 * found[key]:.0f}%" if key in SHARES else f"{found[key]:.1f}"
            table.add_row(escape(text.format(steps=found["steps"])), value)
    sft = Gain(**found["gains"]["sft"])
    for name, gain in found["gains"].items():
        if name != "sft":
            scale = 100 / max(abs(sft.gain), 1e-30)
            told = f"{scale * gain['ahead']:+.0f} ± {scale * gain['error']:.0f}%"
            of = "SFT's gain" if sft.gain > 0 else "SFT's loss"
            table.add_row(escape(f"next step on held-out rows: {name} minus SFT, relative to {of}"), told)
    console.print(table)
    say(f"verdict: {found['objective']}, because {found['why']}.")
    if found.get("share_right", 0) > 0.1:
        say(f"note: {100 * found['share_right']:.0f}% of the negatives are right answers: set negatives.keep: wrong")
