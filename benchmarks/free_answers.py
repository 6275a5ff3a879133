"""What training does to free generation: greedy answers to the held-out prompts of finished runs, as a table.

    python benchmarks/free_answers.py ROWS TOKENS RUN [RUN …]

ROWS held-out rows are answered with at most TOKENS tokens. The table has, for the first run's base and every trained
model: the mean number of words; the share of answers that do not end by themselves, that repeat the same four words
over and over, that are the same as another row's answer, that equal the row's completion, and that equal one of its
negatives (case, punctuation and spaces at the ends are ignored); and the completions' mean log-probability in nats.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

from lowdft.config.recipe import load_recipe
from lowdft.data.example import normal
from lowdft.data.prompting import plain_text
from lowdft.files import read_json
from lowdft.pipeline.context import Run
from lowdft.pipeline.systems import systems
from lowdft.reporting.findings import repeats
from lowdft.sampling import Request, SamplingSettings, get_sampler

COLUMNS = (
    "words",
    "no end, %",
    "repetition, %",
    "given twice, %",
    "completion, %",
    "a negative, %",
    "completions, nats",
)


def main(rows: str, tokens: str, *folders: str) -> None:
    """Prints a line for every model as soon as it is measured."""
    print(f"| | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
    for folder in folders:
        run = Run(load_recipe(folder, []))
        measured = read_json(Path(folder) / "evaluation.json")["systems"]
        for name, model in systems(run, {"base", "after"} if folder == folders[0] else {"after"}):
            values = [*shares(run, model, int(rows), int(tokens)), measured[name]["logps/positive"]]
            cells = " | ".join(f"{value:.1f}" for value in values)
            print(f"| {'base' if name == 'base' else Path(folder).name} | {cells} |", flush=True)


@torch.no_grad()
def shares(run: Run, model, rows: int, tokens: int) -> list[float]:
    """The columns of the table without the last, for one model."""
    model.eval()
    encoded, examples = run.encoded("heldout")[:rows], run.examples("heldout")[:rows]
    sampler = get_sampler(
        "padded", model, run.encoder.end_ids, SamplingSettings(temperature=0.0, max_new_tokens=tokens), 32
    )
    samples = sampler.sample([Request(row["prompt_ids"], 0) for row in encoded])
    texts = [run.encoder.text(sample.token_ids) for sample in samples]
    plain = [bare(text) for text in texts]
    often = Counter(plain)
    return [
        sum(len(text.split()) for text in texts) / len(texts),
        percent(sample.finish_reason == "length" for sample in samples),
        percent(map(repeats, texts)),
        percent(often[text] > 1 for text in plain),
        percent(text == bare(plain_text(one.completion)) for text, one in zip(plain, examples, strict=True)),
        percent(
            text in {bare(plain_text(n)) for n in one.negatives} for text, one in zip(plain, examples, strict=True)
        ),
    ]


def percent(values) -> float:
    """The share of true values."""
    values = [bool(value) for value in values]
    return 100 * sum(values) / len(values)


def bare(text: str) -> str:
    """The text without what does not change its meaning."""
    return normal(text).lower().strip(" .!\"'")


if __name__ == "__main__":
    main(*sys.argv[1:])
