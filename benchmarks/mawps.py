"""MAWPS, word problems with one number as the answer, as rows "Question: …\nAnswer:" -> " 18".

    python benchmarks/mawps.py mawps_train.jsonl mawps_test.jsonl mawps
    lowdft compare recipes/studies/mawps.yaml

Each line of the two files has `question` and `answer` (LLM-Adapters' parsed copy was used). The training rows are drawn
with a fixed seed and written in two halves: `train` is the training data; a copy of the model is fine-tuned on `writer`
and then writes the negatives for the first half (recipes/mawps-writer.yaml).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def read(path: str) -> list[dict]:
    """Rows with prompt and completion, in a fixed random order."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"Question: {row['question'].strip()}\nAnswer:"
        rows.append({"prompt": prompt, "completion": f" {float(row['answer']):g}"})
    random.Random("lowdft").shuffle(rows)
    return rows


def main(train: str, test: str, folder: str) -> None:
    """Writes FOLDER/train.jsonl, FOLDER/writer.jsonl and FOLDER/test.jsonl."""
    rows = read(train)
    parts = {"train": rows[: len(rows) // 2], "writer": rows[len(rows) // 2 :], "test": read(test)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
