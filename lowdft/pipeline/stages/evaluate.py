"""evaluate: measures base and trained model on the held-out rows -> evaluation.json."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdft.data.batch import collate
from lowdft.data.prompting import plain_text
from lowdft.evaluation import answers
from lowdft.files import read_json, write_json
from lowdft.logprobs import choose_layout
from lowdft.logprobs.check import require_finite
from lowdft.objectives import Scores
from lowdft.pipeline.context import Run, say, truth_of
from lowdft.pipeline.systems import greedy_answers, systems
from lowdft.reporting.evaluation_table import print_table
from lowdft.reporting.metrics import SHARES
from lowdft.training.token_budget import Passes

SAMPLES_KEPT = 100


def main(run: Run) -> dict | None:
    """Measures base, trained and compared models on the held-out rows; prints the table and writes it."""
    if not run.examples("heldout"):
        say("there are no held-out rows to evaluate (set data.eval or data.eval_rows)")
        return None
    product = run.evaluation
    if run.base_evaluation.is_done() and product.is_done():
        say(f"{product.path}: already measured")
        result = read_json(product.path)
    else:
        product.begin()
        result = measure_all(run)
        write_json(product.path, result)
        product.finish(rows=result["rows"])
    print_table(result)
    return result


def measure_all(run: Run) -> dict:
    """The contents of evaluation.json."""
    rows, examples = run.encoded("heldout"), run.examples("heldout")
    truths = [truth_of(example) for example in examples]
    kind = run.recipe.evaluation.answer
    kind = answers.detect(truths) if kind == "auto" else kind
    found = {}
    for name, model in systems(run):
        product = run.base_evaluation if name == "base" else None
        if product and product.is_done():
            found[name] = read_json(product.path)
        else:
            found[name] = measure(run, name, model, rows, truths, kind)
            if product:
                product.begin()
                write_json(product.path, found[name])
                product.finish()
        del model  # frees its memory for the next one
    return {
        "rows": len(rows),
        "negatives_per_row": sum(len(row["negative_ids"]) for row in rows) / len(rows),
        "answer": kind,
        "systems": {name: one["measures"] for name, one in found.items()},
        "per_row": {name: one["per_row"] for name, one in found.items()},
        "samples": [_sample(run, i, example, rows[i], found) for i, example in enumerate(examples[:SAMPLES_KEPT])],
    }


def _sample(run: Run, i: int, example, row: dict, found: dict[str, dict]) -> dict:
    """One held-out row for the report: its texts, its negatives, and every system's answer and whether it is right."""
    out = {
        "example_id": example.example_id,
        "prompt": plain_text(example.prompt),
        "completion": plain_text(example.completion),
        **{name: one["texts"][i] for name, one in found.items() if one["texts"]},
    }
    checked = {name: one["per_row"]["accuracy"] for name, one in found.items() if "accuracy" in one["per_row"]}
    out["right"] = {name: bool(values[i]) for name, values in checked.items()}
    scored = {name: one["candidates"][i] for name, one in found.items() if one.get("candidates")}
    weights = _weights(run, scored)
    out["negatives"] = [
        {
            "text": run.encoder.text(ids),
            **{name: logps[k] for name, (logps, _) in scored.items() if k + 1 < len(logps)},
            **({"weight": weights[k]} if weights else {}),
        }
        for k, ids in enumerate(row["negative_ids"])
    ]
    return out


def _weights(run: Run, scored: dict[str, list]) -> list[float] | None:
    """How hard each negative of one row would be pushed down on a first visit; None if the objective has no weights.

    `scored`: (log-probabilities, tokens) of the row's negatives and, last, its completion, by system.
    """
    objective, start = run.objective, run.args.log_u_init
    if not {"base", "after"} <= scored.keys() or len(scored["after"][0]) < 2 or isinstance(start, str):
        return None
    if not objective.uses_log_u or run.args.reference_prompt != "training":
        return None
    policy, ref = (torch.tensor([scored[name][0]], dtype=torch.float64) for name in ("after", "base"))
    tokens = torch.tensor([scored["after"][1]])
    scores = Scores(policy[:, -1], tokens[:, -1], policy[:, :-1], tokens[:, :-1], ref[:, :-1], ref_logps_M=ref[:, -1])
    scores.log_u_M = torch.full((1,), float(start), dtype=torch.float64)
    weights_MB = objective.compute(scores, **run.args.hyperparameters()).weights_MB
    return None if weights_MB is None else weights_MB[0].tolist()


def measure(run: Run, name: str, model, rows: list[dict], truths: list[str], kind: str) -> dict:
    """One system: `measures` by name, per-row values of the shares (`per_row`), and greedy `texts` if they are checked.

    For the rows in the report, `candidates` has (log-probabilities, tokens) of the negatives and, last, the completion.
    """
    scored, texts = score_rows(run, model, rows), []
    names, advice = [row["example_id"] for row in rows], "Its weights contain NaN or infinity, or its dtype overflows."
    require_finite(f"evaluation: log-probabilities under {name}", names, [sums_C for sums_C, _ in scored], advice)
    found = measures_of(scored)
    if kind != "none":
        texts = greedy_answers(run, model, [row["prompt_ids"] for row in rows], name)
        check = answers.checker(kind, run.recipe.evaluation.pattern)
        found["accuracy"] = [float(check(text, truth)) for text, truth in zip(texts, truths, strict=True)]
    measures = {key: sum(values) / len(values) for key, values in found.items()}
    shares = {key: found[key] for key in SHARES if key in found}
    measures |= {f"{key}_stderr": math.sqrt(measures[key] * (1 - measures[key]) / len(rows)) for key in shares}
    candidates = [(sums_C.tolist(), tokens_C.tolist()) for sums_C, tokens_C in scored[:SAMPLES_KEPT]]
    return {"measures": measures, "per_row": shares, "texts": texts, "candidates": candidates}


def score_rows(run: Run, model, rows: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """Every row's log-probabilities (nats, float64) and numbers of tokens: [C] negatives and, last, the completion."""
    model.eval()
    passes = Passes(choose_layout(model, run.args.layout), run.args.logits_chunk_size, run.args.tokens_per_pass)
    with_negatives, found = all(row["negative_ids"] for row in rows), []
    size = run.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch = collate(list(enumerate(rows[start : start + size])))["batch"]
        groups = batch.groups([row["negative_ids"] if with_negatives else [] for row in batch.rows])
        sums = dict.fromkeys(range(len(groups)))
        for count in {len(group.completions) for group in groups}:
            alike = [i for i, group in enumerate(groups) if len(group.completions) == count]
            logps_MK = passes.score(model, [groups[i] for i in alike])
            sums |= zip(alike, logps_MK.double().cpu(), strict=True)
        found += [(sums[i], torch.tensor(group.scored_tokens)) for i, group in enumerate(groups)]
    return found


def measures_of(scored: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Every row's log-probability (nats) of the completion; if all rows have negatives, also their mean and the margin.

    A row counts as won (1, else 0) if its completion is likelier than all of its negatives, by summed (`wins`) or mean
    (`wins_per_token`) log-probability. If the negatives are wrong answers written by people, `wins` is TruthfulQA's MC1
    (Lin et al. 2022, arXiv 2109.07958).
    """
    found = [_of_one(sums_C, tokens_C) for sums_C, tokens_C in scored]
    return {name: [row[name] for row in found] for name in found[0]}


def _of_one(sums_C: Tensor, tokens_C: Tensor) -> dict[str, float]:
    means_C = sums_C / tokens_C
    found = {"logps/positive": sums_C[-1], "logps/positive_per_token": means_C[-1]}
    if len(sums_C) > 1:
        negative = sums_C[:-1].mean()
        found |= {"logps/negative": negative, "margin": sums_C[-1] - negative}
        found |= {"wins": sums_C[-1] > sums_C[:-1].max(), "wins_per_token": means_C[-1] > means_C[:-1].max()}
    return {name: float(value) for name, value in found.items()}
