"""A study on a tiny model: shared products, resuming, repetitions, failures told at the end."""

from __future__ import annotations

import json

import pytest

from lowdft.cli import main
from lowdft.reporting.study_figures import swept_key
from lowdft.study import markdown, tabulate


@pytest.fixture
def study(tmp_path, tiny_folder):
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {tiny_folder}, load_in_4bit: false, dtype: float32}}\n"
        f"output_dir: unused\ndata: {{train: {tmp_path}/rows.jsonl, eval_rows: 3}}\nadapter: {{r: 2}}\n"
        "negatives: {max_new_tokens: 6, batch_size: 4}\n"
        "training: {per_device_train_batch_size: 4, num_train_epochs: 1, use_cpu: true, learning_rate: 1e-2}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    (tmp_path / "study.yaml").write_text(
        f"recipe: recipe.yaml\noutput_dir: {tmp_path}/out\n"
        "grid: {training.objective: [sft, dft, dpo], training.seed: [0, 1]}\n"
    )
    return tmp_path / "study.yaml"


def test_study(study, capsys, monkeypatch):
    """Six runs; what they share is made once: negatives, the base's evaluation, and each objective's reference."""
    from lowdft.pipeline.stages import evaluate, generate, score

    calls, measured = {"generate": 0, "score": 0}, []
    original_measure = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda run, name, *a: measured.append(name) or original_measure(run, name, *a)
    )
    for stage in (generate, score):
        name, original = stage.__name__.rsplit(".", 1)[1], stage.make_in_parts

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(stage, "make_in_parts", counted)
    assert main(["compare", str(study)]) == 0
    out = study.parent / "out"
    assert calls == {"generate": 2, "score": 2}  # training and held-out negatives; what dft needs, what dpo needs
    assert measured.count("base") == 1 and measured.count("after") == 6
    table = json.loads((out / "study.json").read_text())["table"]
    assert [(line["name"], line["runs"]) for line in table] == [("base", 1), ("sft", 2), ("dft", 2), ("dpo", 2)]
    assert table[1]["logps/positive"][0] > table[0]["logps/positive"][0]
    assert all((out / name).stat().st_size > 1000 for name in ("curves.png", "cost.png"))
    assert not (out / "swept.png").exists()  # no number is swept
    first = (out / "study.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/adapter/*.safetensors")}
    assert len(before) == 6
    assert main(["compare", str(study)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/adapter/*.safetensors")} == before
    assert (out / "study.md").read_text() == first
    capsys.readouterr()


def test_a_failing_run_does_not_stop_the_others(study, capsys):
    study.write_text(study.read_text().replace("[sft, dft, dpo]", "[poft, sft]").replace("[0, 1]", "[0]"))
    assert main(["compare", str(study)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 runs failed: objective=poft,seed=0" in told.err and "| sft |" in told.out


def test_table_by_hand():
    """Two seeds each. DFT's rows are right in (1, 1), (.5, 1), (0, 0), (1, 1) of the runs, SFT's in the first alone."""

    def runs(objective, *per_row):
        after = [sum(rows) / len(rows) for rows in per_row]
        return [
            {
                "settings": {"training.objective": objective, "training.seed": seed},
                "base": {"accuracy": 0.1},
                "after": {"accuracy": after[seed]},
                "per_row": {"accuracy": rows},
            }
            for seed, rows in enumerate(per_row)
        ]

    results = runs("sft", [1, 0, 0, 0], [1, 0, 0, 0]) + runs("dft", [1, 1, 0, 1], [1, 0, 0, 1])
    text = markdown(tabulate(results, "training.seed", {}), "training.seed")
    assert "| base | 10.00 | – | 1 |" in text and "| sft | 25.00 ± 0.00 | – | 2 |" in text
    # differences 0, .5, 0, 1: their mean is .375, their standard deviation .479, the standard error half of that
    assert "| dft | 62.50 ± 17.68 | 37.50 ± 23.94 | 2 |" in text and "accuracy ahead, points" in text


def test_cases_a_swept_number_and_the_papers_numbers(study, capsys):
    """Cases set several keys; the margin is drawn against gamma; the paper's numbers stand beside their line."""
    head = study.read_text().partition("grid:")[0]
    study.write_text(
        head + "set: {negatives.system_prompt: null}\n"
        "grid:\n  method: {cold: {training.objective: dft2, training.tau: 0.1}}\n  training.gamma: [1.0, 0.9]\n"
        "paper: {'cold, 0.9': {GSM8K: 78.77}}\n"
    )
    assert main(["compare", str(study)]) == 0
    out = study.parent / "out"
    assert (out / "swept.png").stat().st_size > 1000
    assert "| runs | paper: GSM8K |" in (out / "study.md").read_text()
    lines = {line.split(" | ")[0]: line for line in (out / "study.md").read_text().splitlines()}
    assert lines["| cold, 0.9"].endswith("| 1 | 78.77 |") and lines["| cold, 1.0"].endswith("| 1 | – |")
    recipe = (out / "method=cold,gamma=0.9" / "recipe.yaml").read_text()
    assert "tau: 0.1" in recipe and "objective: dft2" in recipe and "system_prompt: null" in recipe
    capsys.readouterr()


def test_swept_key():
    """The one key with several numbers, seeds aside."""

    def results(**keys):
        return [{"settings": dict(zip(keys, values, strict=True))} for values in zip(*keys.values(), strict=True)]

    assert swept_key(results(gamma=[1.0, 0.9], seed=[0, 1], objective=["dft", "sft"]), "seed") == "gamma"
    assert swept_key(results(gamma=[1.0, 0.9], tau=[1, 2]), "seed") is None
    assert swept_key(results(gamma=[1.0, 1.0], seed=[0, 1]), "seed") is None


@pytest.mark.parametrize(
    "text, told",
    [
        ("recipe: r.yaml", "output_dir is missing"),
        ("recipe: r.yaml\noutput_dir: o\ngrid: {training.seed: 1}", "wanted a list"),
        ("recipe: r.yaml\noutput_dir: o\ngrid: {m: {a: 1}}", "or cases with keys and values"),
        ("recipe: r.yaml\noutput_dir: o\ngrid: {training.tau: [1]}\npaper: {dft: {a: 1}}", "they are 1, base"),
        ("recipe: r.yaml\noutput_dir: o\ngrid: {}\nseeds: 3", "seeds is not a key"),
    ],
)
def test_mistakes_are_told(text, told, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(text)
    assert main(["compare", str(tmp_path / "study.yaml")]) == 1
    assert told in capsys.readouterr().err


def test_a_study_measures_benchmarks_and_the_base_once(study, capsys, monkeypatch, tmp_path):
    benchmarks = pytest.importorskip("lowdft.evaluation.benchmarks")
    pytest.importorskip("lm_eval")
    row = {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "arc.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"answerKey": "B"}) + "\n")
    measured, run = [], benchmarks.run
    monkeypatch.setattr(benchmarks, "run", lambda *args: measured.append(1) or run(*args))
    study.write_text(study.read_text().partition("grid:")[0] + "grid: {training.seed: [0, 1]}\n")
    overrides = [
        "training.objective=sft",
        "evaluation.benchmarks=[arc_easy]",
        f"evaluation.benchmark_data.arc_easy={tmp_path}/arc.jsonl",
    ]
    assert main(["compare", str(study), *overrides]) == 0
    text = (study.parent / "out" / "study.md").read_text()
    runs = len(list((study.parent / "out").glob("*/benchmark.json")))
    assert len(measured) == 3 and runs == 2  # the base's result is borrowed
    assert "| arc_easy | mean |" in text and text.count("50.00") >= runs
    capsys.readouterr()
