"""The calculations written out in GSM8K's solutions, `<<48/2=24>>`, as rows with a prompt "48/2 =" and an answer " 24".

    python benchmarks/gsm8k_calculations.py train.jsonl test.jsonl calculations
    lowdft compare recipes/studies/gsm8k-calculations.yaml

This is real data with answers that can be checked, short enough for a 135M model on a CPU. Every expression occurs
once; those of the test file are left out of the training rows. The order of the rows is random with a fixed seed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

CALCULATION = re.compile(r"<<([\d.+\-*/() ]+)=(-?\d+(?:\.\d+)?)>>")


def main(train: str, test: str, folder: str) -> None:
    """Writes FOLDER/train.jsonl and FOLDER/test.jsonl."""
    held_out = read(test)
    training = {expression: result for expression, result in read(train).items() if expression not in held_out}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, calculations in (("train", training), ("test", held_out)):
        rows = [{"prompt": f"{e} =", "completion": f" {r}"} for e, r in sorted(calculations.items())]
        lines = [json.dumps(row) + "\n" for row in rows]
        random.Random(0).shuffle(lines)
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(lines)} rows")


def read(path: str) -> dict[str, str]:
    """Expression without spaces -> its result as in GSM8K; the first one if they differ."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for expression, result in CALCULATION.findall(json.loads(line)["answer"]):
                found.setdefault(expression.replace(" ", ""), result)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
