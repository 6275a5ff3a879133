"""TruthfulQA's questions as rows: 317 to train on (question, best answer), 500 held out with their wrong answers.

    python benchmarks/truthfulqa.py TruthfulQA.csv truthfulqa
    lowdft compare recipes/studies/truthfulqa.yaml

`lowdft evaluate` then says as "rows won, summed log-prob" what TruthfulQA calls MC1: the share of questions whose best
answer is more likely than every wrong one. The wrong answers are never trained on: negatives are the base's own answers.
The split is drawn with a fixed seed.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

TRAINING = 317


def main(source: str, folder: str) -> None:
    """Writes FOLDER/train.jsonl and FOLDER/test.jsonl."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        rows = [row_of(line) for line in csv.DictReader(file)]
    random.Random("lowdft").shuffle(rows)
    training = [{key: row[key] for key in ("prompt", "completion")} for row in rows[:TRAINING]]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in (("train", training), ("test", rows[TRAINING:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (Path(folder) / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(part)} rows")


def row_of(line: dict[str, str]) -> dict:
    """A question of the file as prompt, best answer, and wrong answers."""
    wrong = [answer.strip() for answer in line["Incorrect Answers"].split(";") if answer.strip()]
    return {
        "prompt": f"Q: {line['Question'].strip()}\nA:",
        "completion": f" {line['Best Answer'].strip()}",
        "negatives": [f" {answer}" for answer in wrong],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
