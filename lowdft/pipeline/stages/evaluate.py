"""evaluate: the held-out rows before and after -> evaluation.json: log-probabilities, wins over negatives, accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdft.data.batch import collate
from lowdft.data.prompting import plain_text
from lowdft.evaluation import answers
from lowdft.files import read_json, write_json
from lowdft.logprobs import choose_layout, score
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import greedy_answers, systems
from lowdft.reporting.evaluation_table import SHARES, print_table

SAMPLES_KEPT = 8


def main(run: Run) -> dict | None:
    """Measures base, trained and compared models on the held-out rows; prints the table and writes it."""
    if not run.examples("heldout"):
        say("no held-out rows (data.eval or data.eval_rows): nothing to evaluate")
        return None
    product = run.evaluation
    if product.is_done():
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
    truths = [example.answer or plain_text(example.completion) for example in examples]
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
        del model  # its memory, for the next one
    samples = []
    for i, example in enumerate(examples[:SAMPLES_KEPT]):
        negative = rows[i]["negative_ids"][0] if rows[i]["negative_ids"] else []
        samples.append(
            {
                "example_id": example.example_id,
                "prompt": plain_text(example.prompt),
                "completion": plain_text(example.completion),
                "negative": run.encoder.text(negative),
                **{name: one["texts"][i] for name, one in found.items() if one["texts"]},
            }
        )
    return {
        "rows": len(rows),
        "negatives_per_row": sum(len(row["negative_ids"]) for row in rows) / len(rows),
        "answer": kind,
        "systems": {name: one["measures"] for name, one in found.items()},
        "per_row": {name: one["per_row"] for name, one in found.items()},
        "samples": samples,
    }


def measure(run: Run, name: str, model, rows: list[dict], truths: list[str], kind: str) -> dict:
    """One system: `measures` by name, those of every row that are shares (`per_row`), and greedy `texts` if checked."""
    found, texts = measure_logps(run, model, rows), []
    if kind != "none":
        texts = greedy_answers(run, model, [row["prompt_ids"] for row in rows], name)
        check = answers.checker(kind, run.recipe.evaluation.pattern)
        found["accuracy"] = [float(check(text, truth)) for text, truth in zip(texts, truths, strict=True)]
    measures = {key: sum(values) / len(values) for key, values in found.items()}
    shares = {key: found[key] for key in SHARES if key in found}
    measures |= {f"{key}_stderr": math.sqrt(measures[key] * (1 - measures[key]) / len(rows)) for key in shares}
    return {"measures": measures, "per_row": shares, "texts": texts}


@torch.no_grad()
def measure_logps(run: Run, model, rows: list[dict]) -> dict[str, list[float]]:
    """Every row's log-probability (nats) of the completion; where all rows have negatives their mean, and the margin.

    A row is won (1, else 0) when its completion outscores every one of its negatives, by summed (`wins`) or mean
    (`wins_per_token`) log-probability. With wrong answers written by people as negatives, `wins` is TruthfulQA's MC1
    (Lin et al. 2022, arXiv 2109.07958).
    """
    model.eval()
    layout = choose_layout(model, run.args.layout)
    with_negatives, found = all(row["negative_ids"] for row in rows), []
    size = run.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch = collate(list(enumerate(rows[start : start + size])))["batch"]
        negatives = [row["negative_ids"] if with_negatives else [] for row in batch.rows]
        out = score(model, batch.groups(negatives), layout, run.args.logits_chunk_size)
        counts = [len(own) + 1 for own in negatives]
        sums, tokens = out.logps_C.double().cpu().split(counts), out.tokens_C.cpu().split(counts)
        found += [_of_one(one, n) for one, n in zip(sums, tokens, strict=True)]
    return {name: [row[name] for row in found] for name in found[0]}


def _of_one(sums_C: Tensor, tokens_C: Tensor) -> dict[str, float]:
    means_C = sums_C / tokens_C
    found = {"logps/positive": sums_C[-1], "logps/positive_per_token": means_C[-1]}
    if len(sums_C) > 1:
        negative = sums_C[:-1].mean()
        found |= {"logps/negative": negative, "margin": sums_C[-1] - negative}
        found |= {"wins": sums_C[-1] > sums_C[:-1].max(), "wins_per_token": means_C[-1] > means_C[:-1].max()}
    return {name: float(value) for name, value in found.items()}
