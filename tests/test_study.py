"""A study on a tiny model: shared products, resuming, repetitions, failures told at the end."""

from __future__ import annotations

import json
import math

import pytest

import lowdft.study
from lowdft.cli import main
from lowdft.reporting.figures import swept_key
from lowdft.reporting.study_table import EQUAL_TIME, TUNED, combined, markdown, tabulate, verdicts


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
        "baselines: false\ngrid: {training.objective: [sft, dft, dpo], training.seed: [0, 1]}\n"
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


def test_cost_counts_negatives_and_reference(tmp_path):
    """Of a run that borrowed them too; SFT has none."""
    facts = {"adapter": 100.0, "negatives.parquet": 20.0, "reference.parquet": 5.5}
    for name, seconds in facts.items():
        (tmp_path / f"{name}.manifest.json").write_text(
            json.dumps({"done": True, "made_from": {}, "facts": {"seconds": seconds}})
        )
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 3.0}))
    systems = {"rows": 1, "systems": {"after": {}, "base": {}}, "per_row": {"after": {}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(systems))
    assert lowdft.study.measures_of(tmp_path)["after"]["seconds"] == 125.5
    for name in ("negatives.parquet", "reference.parquet"):
        (tmp_path / f"{name}.manifest.json").unlink()
    assert lowdft.study.measures_of(tmp_path)["after"]["seconds"] == 100.0


def test_a_failing_run_does_not_stop_the_others(study, capsys):
    study.write_text(study.read_text().replace("[sft, dft, dpo]", "[poft, sft]").replace("[0, 1]", "[0]"))
    assert main(["compare", str(study)]) == 1
    told = capsys.readouterr()
    assert "runs that failed: objective=poft,seed=0" in told.err and "| sft |" in told.out


def test_an_unforeseen_error_does_not_stop_the_others(study, capsys, monkeypatch):
    """Its traceback is kept in the run's folder; the table has the others."""
    study.write_text(study.read_text().replace("[sft, dft, dpo]", "[dft2, sft]").replace("[0, 1]", "[0]"))
    original = lowdft.study.run_one

    def run_one(recipe, overrides, *rest):
        if 'training.objective="dft2"' in overrides:
            raise ZeroDivisionError("by chance")
        original(recipe, overrides, *rest)

    monkeypatch.setattr(lowdft.study, "run_one", run_one)
    assert main(["compare", str(study)]) == 1
    told = capsys.readouterr()
    assert "runs that failed: objective=dft2,seed=0" in told.err and "| sft |" in told.out
    assert "failed: ZeroDivisionError: by chance" in told.out and "Traceback" not in told.out + told.err
    (kept,) = study.parent.rglob("error.txt")
    assert "ZeroDivisionError: by chance" in kept.read_text() and kept.parent.name == "objective=dft2,seed=0"


def test_sft_is_tuned_and_given_as_much_time(study, capsys, monkeypatch):
    """The second learning rate is made the better one, and DFT 2.5 times as slow as SFT."""
    from lowdft import study as module

    original = module.measures_of

    def measured(folder):
        found = original(folder)
        found["after"]["seconds"] = 25.0 if "dft" in folder.name else 10.0
        if folder.name.startswith("tune"):
            found["after"]["accuracy"] = 0.9 if "0.002" in folder.name else 0.1
            assert found["rows"] == 2
        return found

    monkeypatch.setattr(module, "measures_of", measured)
    text = study.read_text().replace("baselines: false", "sft_learning_rates: [1e-2, 2e-3]\ntune_rows: 2")
    study.write_text(text.replace("[sft, dft, dpo]", "[dft]").replace("[0, 1]", "[0]"))
    assert main(["compare", str(study)]) == 0
    out = study.parent / "out"
    table = {line["name"]: line for line in json.loads((out / "study.json").read_text())["table"]}
    assert list(table) == ["base", "sft, tuned", "sft, equal time", "dft"]
    recipes = {path.parent.name: path.read_text() for path in out.glob("baseline*/recipe.yaml")}
    assert all("learning_rate: 0.002" in text and "tune_rows: null" in text for text in recipes.values())
    equal = "baseline=sft, equal time,seed=0,learning_rate=0.002,num_train_epochs="
    assert "num_train_epochs: 2.5" in recipes[equal + "2.5"]
    assert "- dft: differs by " in (out / "study.md").read_text()
    slower = measured  # as with another seed or line: other epochs are another run, not a failed one
    monkeypatch.setattr(module, "measures_of", lambda folder: (found := slower(folder)) and found | {
        "after": found["after"] | ({"seconds": 40.0} if "=dft" in folder.name else {})})  # fmt: skip
    assert main(["compare", str(study)]) == 0 and (out / (equal + "4.0")).is_dir()
    capsys.readouterr()


def test_tuned_sft_that_the_grid_has_is_used_again(study, capsys):
    """No list of learning rates: the recipe's own is taken, and the grid's SFT run is the tuned one."""
    text = study.read_text().replace("baselines: false\n", "").replace("[sft, dft, dpo]", "[sft]")
    study.write_text(text.replace("[0, 1]", "[0]"))
    assert main(["compare", str(study)]) == 0
    out = study.parent / "out"
    assert not list(out.glob("baseline=sft, tuned*"))
    lines = {line["name"]: line for line in json.loads((out / "study.json").read_text())["table"]}
    assert lines["sft, tuned"]["logps/positive"] == lines["sft"]["logps/positive"]
    capsys.readouterr()


def runs(named: dict, *per_row):
    """Results of one line of the table, a seed each, from what every row's answer was worth."""
    return [
        {
            "settings": named | {"training.seed": seed},
            "base": {"accuracy": 0.1},
            "after": {"accuracy": sum(rows) / len(rows)},
            "per_row": {"accuracy": rows},
        }
        for seed, rows in enumerate(per_row)
    ]


def test_table_by_hand():
    """Two seeds each. DFT's rows are right in (1, 1), (.5, 1), (0, 0), (1, 1) of the runs, SFT's in the first alone."""
    results = runs({"o": "sft"}, [1, 0, 0, 0], [1, 0, 0, 0]) + runs({"o": "dft"}, [1, 1, 0, 1], [1, 0, 0, 1])
    text = markdown(tabulate(results, "training.seed", {}), "training.seed")
    assert "| base | 10.00 | – | 1 |" in text and "| sft | 25.00 ± 0.00 | – | 2 |" in text
    # differences of rows 0, .5, 0, 1: mean .375, standard deviation .479, standard error half of that; of runs .5, .25
    assert "| dft | 62.50 ± 17.68 | 37.50 ± 23.94 (12.50) | 2 |" in text and "accuracy ahead, points" in text
    assert "it pays" not in text  # without tuned SFT there is no verdict


def test_verdicts_by_hand():
    """dft is ahead of tuned SFT by 1/2 and of SFT at equal time by 1/4, in both seeds; 400 rows."""
    results = runs({"baseline": TUNED}, *2 * [[1.0, 0.0, 0.0, 0.0] * 100])
    results += runs({"baseline": EQUAL_TIME}, *2 * [[1.0, 1.0, 0.0, 0.0] * 100])
    results += runs({"o": "dft"}, *2 * [[1.0, 1.0, 0.0, 1.0] * 100]) + runs({"o": "orpo"}, *2 * [[0.0] * 400])
    table = tabulate(results, "training.seed", {})
    error = math.sqrt(0.25 / 399)  # rows' differences are 0 or 1, half and half
    assert table[3]["ahead"]["accuracy"] == pytest.approx([0.5, error, 0.0])
    assert combined([0.5, 0.03, 0.04]) == (0.5, 0.05) and combined([0.5, 0.03, None]) == (0.5, 0.03)
    told = verdicts(table)
    assert told[0].startswith(
        "dft: differs by +50.0 ± 2.5 points from tuned SFT, +25.0 ± 2.2 points from SFT at equal time, over"
    )
    assert told[0].endswith("over 2 seeds (accuracy): it pays.") and told[1].endswith("SFT is better.")
    same = tabulate(results[:4] + runs({"o": "x"}, *2 * [[1.0, 0.0, 0.0, 0.0] * 100]), "training.seed", {})
    assert verdicts(same)[0].endswith("no difference beyond two standard errors.")  # SFT with more time is better


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
        ("recipe: r.yaml\noutput_dir: o\ngrid: {}\nseeds: 3", "seeds is not a study key"),
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
