"""Writes multiple-choice rows: the right option is the completion, the other options are its negatives.

    python benchmarks/choices.py arc_easy_train.jsonl arc_easy_test.jsonl arc-easy
    lowdft compare recipes/studies/arc-easy.yaml

Each line of the two files has `question`, `choices` (a list) and `answer` (the index of the right one), as in AI2 ARC
and OpenBookQA (LLM-Adapters' parsed copies were used). Prompts read "Question: …\nAnswer:". Rows are drawn with a fixed
seed: 768 to train on, 300 to tune learning rates on (`dev`, from the training file), at most 1,000 of the test file.
`bare` has the training rows and the `dev` rows without the other options, for negatives sampled from the model.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TRAINING, DEV, TEST = 768, 300, 1000


def read(path: str) -> list[dict]:
    """Rows of a file with prompt, completion and negatives, in a fixed random order."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        options = [f" {option.strip()}" for option in row["choices"]]
        right = options.pop(row["answer"])
        prompt = f"Question: {row['question'].strip()}\nAnswer:"
        rows.append({"prompt": prompt, "completion": right, "negatives": options})
    random.Random("lowdft").shuffle(rows)
    return rows


def main(train: str, test: str, folder: str) -> None:
    """Writes FOLDER/train.jsonl, FOLDER/dev.jsonl, FOLDER/test.jsonl and FOLDER/bare.jsonl."""
    rows = [row for row in read(train) if len(row["negatives"]) == 3]
    parts = {"train": rows[:TRAINING], "dev": rows[TRAINING : TRAINING + DEV], "test": read(test)[:TEST]}
    parts["bare"] = [{key: row[key] for key in ("prompt", "completion")} for row in parts["train"] + parts["dev"]]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
