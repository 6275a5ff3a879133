"""Memory and time from rows to the first steps, with a tiny model: `python benchmarks/rows.py text|ids ROWS FOLDER`.

text: ROWS rows of 60 + 80 words with four negatives of 60 words. ids: ROWS rows whose twelve negatives of 150 tokens
are in negatives.parquet, as after generation. `lowdft train` runs twice for two steps; the second run maps the rows
that the first prepared. Prints seconds, and the peak memory of the largest process in GB.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
ROOT = Path(__file__).parents[1]


def main(kind: str, count: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    from helpers import save_tiny_model

    save_tiny_model(folder / "tiny")
    make_rows(folder / "rows.jsonl", count, negatives=4 if kind == "text" else 0)
    (folder / "recipe.yaml").write_text(
        f"output_dir: {folder}/run\n"
        f"model: {{name_or_path: {folder}/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {folder}/rows.jsonl}}\nadapter: {{r: 2}}\nnegatives: {{per_prompt: 12}}\n"
        "training: {objective: dft2, max_steps: 2, max_length: 512, use_cpu: true, disable_tqdm: true}\n"
    )
    if kind == "ids":
        write_negatives(folder, count)
    report = {"rows": count}
    for call in ("first", "second"):
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "run" / "adapter", ignore_errors=True)
        (folder / "run" / "adapter.manifest.json").unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lowdft", "train", str(folder / "recipe.yaml")], check=True, cwd=ROOT)
        report[f"s, {call} call"] = round(time.perf_counter() - start, 1)
        report["peak GB of the largest process so far"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(json.dumps(report, indent=2))


def make_rows(path: Path, count: int, negatives: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(60), "completion": text(80)}
            if negatives:
                row["negatives"] = [text(60) for _ in range(negatives)]
            file.write(json.dumps(row) + "\n")


def write_negatives(folder: Path, count: int) -> None:
    """Writes negatives.parquet with its manifest, as if they had been sampled from the base."""
    import numpy as np

    from lowdft.config.recipe import load_recipe
    from lowdft.pipeline.context import Run

    run = Run(load_recipe(folder / "recipe.yaml"))
    product, ids = run.negatives("train"), run.examples("train").table["example_id"]
    product.begin()
    random_ids = np.random.default_rng(0)
    writer = None
    for start in range(0, count, 1000):
        names = ids[start : start + 1000].combine_chunks()
        inner = pa.ListArray.from_arrays(
            pa.array(np.arange(0, len(names) * 12 * 150 + 1, 150), pa.int32()),
            pa.array(random_ids.integers(3, 90, len(names) * 12 * 150), pa.int64()),
        )
        outer = pa.ListArray.from_arrays(pa.array(np.arange(0, len(inner) + 1, 12), pa.int32()), inner)
        table = pa.table({"example_id": names, "negative_ids": outer})
        writer = writer or pq.ParquetWriter(product.path, table.schema)
        writer.write_table(table)
    writer.close()
    product.finish(rows=count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
