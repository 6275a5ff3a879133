"""The negatives that the base writes: resuming, repeating, what stands in their file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
from helpers import ROWS, folder, interrupt

from lowdft.cli import main
from lowdft.config.recipe import load_recipe
from lowdft.pipeline import negatives
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import generate
from lowdft.sampling import Sample


def test_generation_goes_on_after_a_kill(recipe, monkeypatch):
    """Killed in the second part, then gone on: the same negatives, seeds and finish reasons as without the kill."""
    assert main(["generate", recipe]) == 0
    whole = pq.read_table(folder(recipe) / "negatives.parquet").to_pylist()
    shutil.rmtree(folder(recipe))
    interrupt(monkeypatch, generate, "write_negatives", call=2)
    assert main(["generate", recipe]) == 130
    assert not (folder(recipe) / "negatives.parquet").exists()
    assert len(list((folder(recipe) / "negatives.parts").iterdir())) == 1
    assert main(["generate", recipe]) == 0
    assert pq.read_table(folder(recipe) / "negatives.parquet").to_pylist() == whole


def test_parts_of_another_size_or_of_other_settings(recipe, monkeypatch):
    """Interrupted, then gone on with a smaller batch: no row lost or twice. Parts without a manifest are not used."""
    assert main(["generate", recipe, f"output_dir={folder(recipe)}2"]) == 0
    whole = pq.read_table(f"{folder(recipe)}2/negatives.parquet")
    calls = interrupt(monkeypatch, generate, "write_negatives", call=3)
    assert main(["generate", recipe]) == 130
    assert main(["generate", recipe, "negatives.batch_size=2"]) == 0
    assert pq.read_table(folder(recipe) / "negatives.parquet").to_pylist() == whole.to_pylist()
    shutil.rmtree(folder(recipe)), calls.clear()
    assert main(["generate", recipe]) == 130
    (folder(recipe) / "negatives.parquet.manifest.json").unlink()
    assert main(["generate", recipe, "negatives.seed=5"]) == 0
    seeds = pq.read_table(folder(recipe) / "negatives.parquet")["seeds"].to_pylist()
    assert not any(a == b for a, b in zip(seeds, whole["seeds"].to_pylist(), strict=True))


def test_negatives_do_not_depend_on_the_order_of_rows(recipe):
    """Seeds hang on the row's content: the same rows in another order, in other batches, get the same negatives."""
    assert main(["generate", recipe, "data.eval_rows=null"]) == 0
    first = {r["example_id"]: r["negatives"] for r in pq.read_table(folder(recipe) / "negatives.parquet").to_pylist()}
    rows = Path(recipe).parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    again = ["data.eval_rows=null", "negatives.batch_size=3", f"output_dir={folder(recipe)}2"]
    assert main(["generate", recipe, *again]) == 0
    second = pq.read_table(Path(f"{folder(recipe)}2") / "negatives.parquet").to_pylist()
    assert {r["example_id"]: r["negatives"] for r in second} == first


def test_records_of_a_negative(recipe):
    assert main(["generate", recipe]) == 0
    row = pq.read_table(folder(recipe) / "negatives.parquet").to_pylist()[0]
    assert (
        len(row["negatives"]) == len(row["negative_ids"]) == len(row["finish_reasons"]) == len(set(row["seeds"])) == 4
    )
    for ids, reason in zip(row["negative_ids"], row["finish_reasons"], strict=True):
        assert (reason == "stop") == (ids[-1] == 2)
        assert reason == "stop" or len(ids) == 6


def test_negatives_file_is_a_data_set(recipe, capsys):
    """What generate wrote trains by itself: rows that bring their negatives need no base to write them."""
    assert main(["generate", recipe]) == 0
    shutil.copy(folder(recipe) / "negatives.parquet", Path(recipe).parent / "mine.parquet")
    arguments = [
        recipe,
        f"data.train={Path(recipe).parent}/mine.parquet",
        "data.eval_rows=null",
        "training.num_train_epochs=1",  # an empty negative is dropped, so a row may have fewer than it was given
        f"output_dir={folder(recipe)}2",
    ]
    capsys.readouterr()
    assert main(["run", *arguments]) == 0
    assert "the rows have their own" in capsys.readouterr().out


def test_resample_replaces_unusable_negatives(recipe, monkeypatch):
    """A negative that is empty or equals the completion is drawn again under a new seed, as often as asked."""
    run = Run(load_recipe(recipe, ["negatives.resample=2"]))
    good = run.tokenizer("bad", add_special_tokens=False).input_ids

    class Sampler:
        def __init__(self):
            self.seeds = []

        def sample(self, requests):
            first = not self.seeds
            self.seeds += [request.seed for request in requests]
            return [Sample([2] if first else [*good, 2], "stop") for _ in requests]

    sampler = Sampler()
    (row,) = generate.write_negatives(run, sampler, run.examples("train")[:1], 2)
    assert row["negatives"] == ["bad", "bad"]
    assert len(set(sampler.seeds)) == 4
    torch.manual_seed(0)


def test_a_negative_ends_before_a_stop_text(recipe):
    """Its ids are cut at the token that brings the text, and end as an answer; one without such a text stays whole."""
    tokenizer = Run(load_recipe(recipe, [])).tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    long = Sample(ids("no") + ids("|") + ids("yes"), "length")
    assert negatives.end_at(["?", "|"], long, tokenizer, 7) == Sample([*ids("no"), 7], "stop")
    for stop in ([], ["?"]):
        assert negatives.end_at(stop, long, tokenizer, 7) is long
