"""benchmark: the harness's own numbers on local rows, base and adapter in one load, each result kept for its model."""

from __future__ import annotations

import json
import statistics

import pytest
from helpers import make_run_folder, say_other_base

from lowdft import models
from lowdft.cli import main
from lowdft.config.sections import EvaluationSection
from lowdft.errors import UserError
from lowdft.evaluation import benchmarks
from lowdft.evaluation.metamath import TASKS, final_answer
from lowdft.evaluation.paired import difference
from lowdft.pipeline.stages import benchmark

pytest.importorskip("lm_eval")
GSM8K = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
ARC = [
    {"question": f"{n}?", "choices": {"text": ["a", "bb", "cd"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[n % 3]}
    for n in range(6)
]


@pytest.fixture
def data(tmp_path) -> dict:
    """Local rows of two benchmarks, with short prompts."""
    for name, rows in (("gsm8k", GSM8K), ("arc", ARC)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gsm8k, arc = str(tmp_path / "gsm8k.jsonl"), str(tmp_path / "arc.jsonl")
    return {"gsm8k": {"train": gsm8k, "test": gsm8k}, "arc_easy": arc}


def make_run(tmp_path, base, data, **evaluation):
    return make_run_folder(
        tmp_path, base, evaluation=EvaluationSection(benchmark_data=data, batch_size=4, **evaluation)
    )


def samples(result: dict, keys=("doc_id", "filter", "doc_hash", "prompt_hash", "resps", "filtered_resps")) -> list:
    return [[one[key] for key in keys] for one in result["samples"]]


def test_base_scores_are_the_harness_own_sample_for_sample(tmp_path, tiny_folder, data):
    from lm_eval import simple_evaluate

    run = make_run(tmp_path, tiny_folder, data)
    for name, shots in (("arc_easy", 0), ("gsm8k", 5)):
        one = benchmarks.Benchmark(name, shots)
        tasks = benchmarks.load(one, data[name])
        ours = benchmarks.run(run.base(), run.tokenizer, one, tasks, 3, 2)
        files = data[name] if isinstance(data[name], dict) else {"train": data[name], "test": data[name]}
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        theirs = simple_evaluate(
            model="hf", model_args=f"pretrained={tiny_folder},dtype=float32", num_fewshot=shots, limit=3, batch_size=2,
            tasks=[{"group": "local", "task": [{"task": name, **local}]}], device="cpu",
        )  # fmt: skip
        found = theirs["results"][name]
        assert ours["metrics"] == {key: found[key] for key in ours["metrics"]} and ours["shots"] == shots
        assert samples(ours) == samples({"samples": theirs["samples"][name]})
        assert ours["rows"] == 3 and len(benchmarks.per_row(ours)) == 3


def test_base_and_adapter_are_scored_in_one_load_and_kept(tmp_path, tiny_folder, data, monkeypatch, capsys):
    run = make_run(tmp_path, tiny_folder, data, benchmarks=["arc_easy"])
    loads, load_base = [], models.load_base
    monkeypatch.setattr(models, "load_base", lambda *args: loads.append(1) or load_base(*args))
    result = benchmark.main(run)
    assert len(loads) == 1
    systems = result["tasks"]["arc_easy"]["systems"]
    kept = {path.name.split("-")[0]: json.loads(path.read_text()) for path in run.folder.glob("benchmarks/*/*.json")}
    rows = {name: [one["per_row"][f"arc_easy/{n}"] for n in range(6)] for name, one in kept.items()}
    for name in ("base", "after"):
        assert systems[name]["value"] == statistics.mean(rows[name])
    written = [path.read_text() for path in sorted(run.folder.glob("benchmarks/*/*.jsonl"))]
    assert len(written) == 2 and written[0] != written[1]  # the adapter was on once
    gaps = [a - b for a, b in zip(rows["after"], rows["base"], strict=True)]
    ahead = systems["after"]["ahead"]
    assert ahead["paired"] and ahead["value"] == pytest.approx(statistics.mean(gaps))
    assert ahead["stderr"] == pytest.approx(statistics.stdev(gaps) / 6**0.5)
    assert "arc_easy" in capsys.readouterr().out
    text = "".join(path.read_text() for path in run.folder.glob("benchmark*/**/*") if path.is_file())
    assert str(tmp_path) not in text and str(tiny_folder) not in text

    assert benchmark.main(run) == result and len(loads) == 1  # nothing is loaded again
    next(run.folder.glob("benchmarks/arc_easy/after-*.json")).unlink()
    assert benchmark.main(run) == result and len(loads) == 2  # what an interruption left out
    benchmark.main(run, limit=2)
    assert len(list(run.folder.glob("benchmarks/arc_easy/base-*.json"))) == 2  # another limit is another result


def test_another_adapter_is_another_result(tmp_path, tiny_folder, data):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    runs = [make_run(tmp_path / "one", tiny_folder, data)]
    runs.append(make_run(tmp_path / "two", tiny_folder, data))
    weights = runs[1].training.path / "adapter_model.safetensors"
    one = benchmarks.Benchmark("arc_easy")

    def names(run) -> dict:
        found = benchmark.identities(run)
        return {name: benchmark.result_file(run, name, identity, one, None).name for name, identity in found.items()}

    first, second = map(names, runs)
    assert first == second
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    runs[1].training.finish()
    changed = names(runs[1])
    assert changed["base"] == first["base"] and changed["after"] != first["after"]


@pytest.mark.parametrize("names, words", [
    pytest.param(["gsm8"], "gsm8: .* no task of this name. Did you mean 'gsm8k'", marks=pytest.mark.slow),
    (["hellaswag"], "hellaswag: its data set could not be fetched .*hf download --repo-type dataset Rowan/hellaswag"),
])  # fmt: skip
def test_what_is_not_there_is_told_before_a_model_is_loaded(tmp_path, tiny_folder, data, names, words, monkeypatch):
    run = make_run(tmp_path, tiny_folder, data)
    monkeypatch.setattr(models, "load_base", None)
    with pytest.raises(UserError, match=words):
        benchmark.main(run, names)


def test_local_rows_lacking_a_split_or_a_file(data):
    with pytest.raises(UserError, match="benchmark_data.gsm8k has test; gsm8k also reads the split train"):
        benchmarks.load(benchmarks.Benchmark("gsm8k", 5), {"test": data["gsm8k"]["test"]})
    with pytest.raises(UserError, match="benchmark_data.gsm8k: test is nowhere.jsonl; there is no such file"):
        benchmarks.load(benchmarks.Benchmark("gsm8k", 0), "nowhere.jsonl")


def test_an_adapter_of_another_base(tmp_path, tiny_folder, data, capsys):
    run = make_run(tmp_path, tiny_folder, data, benchmarks=["arc_easy"])
    say_other_base(run, "someone/else@1")
    assert main(["chat", str(run.folder)]) == 1
    assert "was trained on another base (someone/else@1)" in capsys.readouterr().err


def test_metamath_on_local_rows(tmp_path, tiny_folder, data, monkeypatch):
    pytest.importorskip("math_verify")
    run = make_run(tmp_path, tiny_folder, {"metamath_gsm8k": data["gsm8k"]["test"]}, benchmarks=["metamath_gsm8k"])
    with pytest.raises(UserError, match="metamath_gsm8k: the model's context is too short for its answers"):
        benchmark.main(run)
    monkeypatch.setitem(TASKS["metamath_gsm8k"]["generation_kwargs"], "max_gen_toks", 4)
    found = benchmark.main(run)["tasks"]["metamath_gsm8k"]
    assert found["rows"] == 8 and found["metric"] == "accuracy,none" and found["shots"] == 0
    assert found["systems"]["after"]["ahead"]["paired"]
    (samples,) = run.folder.glob("benchmarks/metamath_gsm8k/base-*.samples.jsonl")
    assert json.loads(samples.read_text().splitlines()[0])["target"] == "$1$"


@pytest.mark.slow
def test_a_tag_has_no_score():
    with pytest.raises(UserError, match="ai2_arc: this name stands for several tasks.*arc_challenge, arc_easy"):
        benchmarks.named(["ai2_arc"])


def test_the_paper_suite_is_table_7():
    found = {one.task: (one.shots, one.metric, one.chat_template) for one in benchmarks.SUITES["paper"]}
    assert len(found) == 7 and found["arc_challenge"] == (25, "acc_norm,none", False)
    assert found["gsm8k"] == (5, "exact_match,strict-match", False)
    assert [name for name, settings in found.items() if settings[2]] == ["ifeval"]


@pytest.mark.parametrize("text, truth, right", [
    ("So 3 * 4 = 12.\n#### 12\nThe answer is: 12", "… #### 12", 1.0),
    ("Half of it. The answer is: \\frac{1}{2}", "so $\\boxed{\\frac12}$.", 1.0),
    ("… \\boxed{0.5}. The answer is: 7", "so $\\boxed{\\frac12}$.", 1.0),
    ("The answer is: 13.", "… #### 12", 0.0),
    ("no idea", "… #### 12", 0.0),
])  # fmt: skip
def test_mathematics_is_judged_by_value(text, truth, right):
    pytest.importorskip("math_verify")
    doc = {"problem": "?", "solution": truth}
    assert TASKS["metamath_math"]["process_results"](doc, [text]) == {"accuracy": right}


def test_final_answers():
    assert final_answer("1 + 1.\n#### 2\nThe answer is: 2") == "$2$"
    assert final_answer("so $\\boxed{3}$") == "so $\\boxed{3}$"


def test_unpaired_difference_adds_the_errors():
    scores = {"value": 0.5, "stderr": 0.03}, {"value": 0.25, "stderr": 0.04}
    assert difference({}, {}, *scores) == {"value": 0.25, "stderr": pytest.approx(0.05), "paired": False}


def test_alpaca_eval_outputs(tmp_path, tiny_folder, capsys):
    rows = [{"instruction": "Say a.", "dataset": "koala"}, {"instruction": "Say b."}]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    run = make_run(tmp_path, tiny_folder, {"alpaca_eval": str(tmp_path / "alpaca.json")}, max_new_tokens=3)
    assert benchmark.main(run, ["alpaca_eval"]) is None
    base, after = (json.loads((run.folder / f"benchmarks/alpaca_eval/{n}.json").read_text()) for n in ("base", "after"))
    assert [one["instruction"] for one in base] == ["Say a.", "Say b."] and base[0]["dataset"] == "koala"
    assert [one["output"] for one in base] != [one["output"] for one in after]
    assert "alpaca_eval --model_outputs" in capsys.readouterr().out
