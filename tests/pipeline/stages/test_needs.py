"""Recipes and what their objectives need: a user's own preference data, scores of aligned models, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lowdft import objectives
from lowdft.cli import main
from lowdft.config.recipe import load_recipe
from lowdft.logprobs import Group, score
from lowdft.pipeline.context import Run

PAIRS = [{"prompt": f"{a}+{a}?", "chosen": str(2 * a), "rejected": str(2 * a + 1)} for a in range(7)]
PAIRWISE = [name for name in objectives.names() if objectives.get(name).compute.__module__.endswith("pairwise")]


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe for 4 training and 3 held-out preference pairs, seen twice; without greedy answers."""
    write(tmp_path, PAIRS)
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 3}}\n"
        "adapter: {r: 2}\n"
        "training: {negatives_per_step: 1, per_device_train_batch_size: 2, num_train_epochs: 2, use_cpu: true}\n"
        "evaluation: {answer: none}\n"
    )
    return str(tmp_path / "recipe.yaml")


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", PAIRWISE)
def test_preference_data_needs_no_generation(recipe, name, monkeypatch, tmp_path):
    """`chosen` and `rejected` go through `lowdft run` as they are; held-out pairs are measured, none is written."""
    unwanted = "lowdft.pipeline.stages.generate.write_negatives"
    monkeypatch.setattr(unwanted, lambda *_: pytest.fail("negatives were generated"))
    assert main(["run", recipe, f"training.objective={name}"]) == 0
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"negatives.parquet", "heldout_negatives.parquet"} & made
    needs = objectives.get(name).needs
    assert ("reference.parquet" in made) == ("reference" in needs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["logps/negative"] < 0 for line in lines)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["negatives_per_row"] == 1 and "wins" in evaluation["systems"]["after"]
    if "reference" in needs:
        scored = pq.read_table(tmp_path / "run" / "reference.parquet").to_pylist()
        assert [len(row["ref_negative_logps"]) for row in scored] == [1] * 4 and scored[0]["ref_logps"] < 0


@pytest.mark.parametrize("name", ["dynamic_ft", "f_sft", "ift"])
def test_objectives_on_completions_alone(recipe, name, tmp_path):
    """They train and are measured on preference data too, of which they use `chosen`."""
    assert main(["run", recipe, f"training.objective={name}"]) == 0
    scored = tmp_path / "run" / "reference.parquet"
    assert scored.is_file() == (name == "f_sft")
    assert not scored.is_file() or pq.read_table(scored).column_names == ["example_id", "ref_logps"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_scores_of_aligned_models_come_with_the_rows(recipe, tmp_path, capsys):
    """PoFT: -log sigmoid(P/T - c) is smaller where the aligned models found the completions less likely."""
    first = []
    for mean in (-1.0, -9.0):
        write(tmp_path, [row | {"score": mean} for row in PAIRS])
        more = ["data.columns={aligned_logps: score}", "training.objective=poft", f"output_dir={tmp_path}/{mean}"]
        assert main(["run", recipe, *more]) == 0
        first.append(json.loads((tmp_path / str(mean) / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert first[1] < 0.1 < 2 < first[0]
    write(tmp_path, [row | {"aligned_logps": 0.3} for row in PAIRS])
    assert main(["run", recipe, "training.objective=poft"]) == 1
    assert "aligned_logps is a number (0.3); a mean log-probability" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["training.objective=poft"], "have no `aligned_logps`"),
        (["training.objective=kto", "training.per_device_train_batch_size=1"], "2 or more for kto"),
        (["training.objective=dft", "training.negatives_per_step=2"], "rows.jsonl:4) have too few negatives"),
        (["training.objective=dpo", "training.negatives_per_step=2"], "too few negatives (the fewest: 1)"),
        (["training.objective=dpo", "training.reference=online", "adapter=null"], "needs an adapter to switch off"),
        (["training.objective=dpo", "training.reference_prompt=sampling"], "wanted training for dpo"),
        (
            ["training.freeze_half=true", "adapter=null", "training.objective=sft"],
            "freezes half of an adapter",
        ),
        (["training.objective=f_sft", "training.objective_args={divergence: kl}"], "wanted total_variation"),
        (["training.objective=dpo", "training.objective_args={beta: 5e-5x}"], "dpo cannot be computed with"),
        (["training.objective=cpo", "training.objective_args={betta: 1}"], "hyper-parameters of cpo"),
        (["training.objective=simppo"], "Did you mean 'simpo'"),
        (["training.offload_checkpoints=true"], "together with gradient_checkpointing: true"),
    ],
)
def test_unmet_needs_are_told_before_a_model_is_loaded(recipe, overrides, words, capsys, monkeypatch):
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, *overrides]) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_held_out_rows_bring_wrong_answers_of_their_own(recipe, tmp_path):
    """One to three a row where training rows have none: the base writes for training alone; all of a row's count."""
    wrong = [["7"], ["1", "22"], ["3", "5 5", "60"]]
    held = [{"prompt": f"{a}-{a}?", "completion": "0", "negatives": own} for a, own in enumerate(wrong)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    write(tmp_path, [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    overrides = ["data.eval=" + str(tmp_path / "held.jsonl"), "data.eval_rows=null", "negatives.max_new_tokens=4"]
    assert main(["run", recipe, "training.objective=dft2", *overrides]) == 0
    assert not (tmp_path / "run" / "heldout_negatives.parquet").exists()
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["negatives_per_row"] == 2
    run = Run(load_recipe(recipe, ["training.objective=dft2", *overrides]))
    model, wins, margins = run.base(), [], []
    for row in run.encoded("heldout"):
        good, *bad = [
            score(model, [Group(row["prompt_ids"], [ids])], "padded").logps_C.item()
            for ids in [row["completion_ids"], *row["negative_ids"]]
        ]
        wins.append(float(good > max(bad)))
        margins.append(good - sum(bad) / len(bad))
    assert len(bad) == 3 and evaluation["per_row"]["base"]["wins"] == wins
    base = evaluation["systems"]["base"]
    assert base["wins"] == pytest.approx(sum(wins) / 3) and base["margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)
