"""report: a small fake run folder in, one page and one picture out."""

from __future__ import annotations

import json
import math
import re
import struct

import pytest

from lowdft.config.sections import DataSection, ModelSection, Recipe
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import report
from lowdft.reporting import evaluation_table

EVALUATION = {
    "rows": 3, "negatives_per_row": 2, "answer": "number",
    "systems": {
        "base": {"logps/positive": -31.2, "logps/negative": -40.1, "margin": 8.9, "wins": 0.62, "wins_per_token": 0.55,
                 "accuracy": 0.255, "accuracy_stderr": 0.02},
        "after": {"logps/positive": -3.25, "logps/negative": -60.1, "margin": 56.85, "wins": 1.0, "wins_per_token": 0.9,
                  "accuracy": 0.83, "accuracy_stderr": 0.0375},
        "sft": {"logps/positive": -4.0},
    },
    "samples": [{"example_id": "r<1>", "prompt": "9 < 10 & so?", "completion": "<b>10</b>", "negative": "<script>9",
                 "base": "nine", "after": ""}],
}  # fmt: skip


def make_run(folder, base, objective="dft", training_done=True) -> Run:
    """A run of six rows, four of them for training, as it stands after the train stage."""
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"{i} or {i + 1}?", "completion": f"{i + 1}"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(Recipe(
        output_dir=str(folder / "first"),
        model=ModelSection(name_or_path=str(base), hub_id="someone/tiny-llama", load_in_4bit=False, dtype="float32"),
        data=DataSection(train=str(data), eval_rows=2),
        training={"objective": objective, "per_device_train_batch_size": 4, "num_train_epochs": 8, "use_cpu": True},
    ))  # fmt: skip
    run.check()
    run.training.path.mkdir(parents=True)
    run.training.begin()
    if training_done:
        run.training.finish(steps=8, seconds=1.0)
    return run


def write_metrics(run: Run, weight: float | None = 0.5, steps: int = 8) -> None:
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 40.0 - step, "logps/positive": -40.0 + step, "tokens_per_second": 100.0 * step,
                "peak_memory_gb": 1.0 + step / 8, "epoch": float(step)}  # fmt: skip
        if weight is not None:
            line |= {"logps/negative": -40.0 - step, "margin": 2.0 * step, "weights/mean": weight, "log_u/mean": -step}
            line |= {"reference/gap": 0.0125} if step == 1 else {}
        lines.append(json.dumps(line) + "\n")
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def text_of(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


def test_page_tells_what_was_trained_and_measured(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    run.negatives("train").finish(rows=4, negatives=64, empty=3, cut_at_max_new_tokens=5)
    run.evaluation.begin()
    (run.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    run.evaluation.finish(rows=3)
    report.main(run)
    page = text_of(run)
    for wanted in [
        "<dt>base</dt><dd>someone/tiny-llama</dd>",
        "<dt>weights</dt><dd>dense, float32</dd>",
        "<dt>objective</dt><dd>dft (arXiv 2502.18679, Eq. 7-8)</dd>",
        "<dt>hyper-parameters</dt><dd>tau 1.0, gamma 0.85, nll_weight 0.0</dd>",
        "<h1>first: dft on someone/tiny-llama</h1>",
        "<dt>rows</dt><dd>4</dd>",
        "<dt>steps</dt><dd>8, 4 prompts a step and device</dd>",
        "<dt>peak memory</dt><dd>2.00 GB</dd>",
        "<dt>speed</dt><dd>500 tokens/s (median step)</dd>",
        "<dt>|policy - reference| at step 1</dt><dd>0.0125 nats</dd>",
        "<dt>negatives</dt><dd>64</dd>",
        "<dt>cut at max new tokens</dt><dd>5</dd>",
        "<th></th><th>base</th><th>after</th><th>sft</th>",
        "<td>25.5 ± 2.0%</td><td>83.0 ± 3.8%</td><td>–</td>",
        "3 held-out rows, 2 negatives a row",
        "load_in_4bit: false",
    ]:
        assert wanted in page, wanted
    assert page.count("<svg") == 5  # log-probabilities, margin, weights, loss, log_u
    assert "no longer pull" not in page and "not finished" not in page


def test_page_is_self_contained_and_escapes_what_users_wrote(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    page = report.page(run, report.read_metrics(run, finished=False), EVALUATION)
    assert "&lt;script&gt;9" in page and "&lt;b&gt;10&lt;/b&gt;" in page and "9 &lt; 10 &amp; so?" in page
    assert "<h3>r&lt;1&gt;</h3>" in page and "<dt>after</dt><dd><pre><i>empty</i></pre></dd>" in page
    assert not re.search(r"<script|<link|<img|@import|src=|url\(http", page)
    assert report.INK not in page and "currentColor" in page  # readable on light and on dark
    assert not re.search(r"</svg>\s*<(?!/figure)", page)


def test_dead_weights_are_told_in_words(tmp_path, tiny_folder, capsys):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run, weight=2e-4)
    report.main(run)
    warning = "the negatives no longer pull: their mean weight over the last quarter of the steps is 2.0e-04"
    assert warning in text_of(run) and warning in capsys.readouterr().out
    for remedy in ("lower training.learning_rate", "larger training.tau", "harder negatives"):
        assert remedy in text_of(run)


def test_only_the_last_quarter_of_the_weights_counts():
    """Of 8 steps the last two: (0.002 + 0.016) / 2 = 0.009 is under 0.01, (0.006 + 0.016) / 2 = 0.011 is not."""
    early = [{"weights/mean": 1.0}] * 6
    assert "9.0e-03" in report.spent([*early, {"weights/mean": 0.002}, {"weights/mean": 0.016}])
    assert report.spent([*early, {"weights/mean": 0.006}, {"weights/mean": 0.016}]) is None
    assert report.spent([{"loss": 1.0}]) is None


def test_sft_without_an_evaluation(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, objective="sft")
    write_metrics(run, weight=None)
    report.main(run)
    page = text_of(run)
    assert page.count("<svg") == 2  # log-probabilities, loss
    assert "<dd>none: sft uses no negatives</dd>" in page and "Not evaluated." in page
    assert "<dd>sft (maximum likelihood)</dd>" in page and "<h2>Samples</h2>" not in page


def test_picture_has_both_curves_and_units(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    report.main(run)
    png = (run.folder / "logps.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (1152, 672)
    [axes] = report.logps_figure(report.read_metrics(run, finished=False)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "log-probability (nats)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["completions (positives)", "negatives"]
    raw = axes.lines[0]
    assert list(raw.get_xdata()) == list(range(1, 9)) and list(raw.get_ydata()) == [-39.0 + i for i in range(8)]


def test_smoothing_keeps_length_and_shortens_at_the_ends():
    """40 values: half a window is 1, so the mean of up to 3 neighbours."""
    values = [float(i % 2) for i in range(40)]
    smoothed = report.smooth(values)
    assert len(smoothed) == 40 and smoothed[0] == 0.5 and math.isclose(smoothed[1], 1 / 3)
    assert report.smooth([1.0, 5.0]) == [1.0, 5.0]


def test_unfinished_training_is_said_and_a_cut_off_line_skipped(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, training_done=False)
    with pytest.raises(UserError, match="holds no step yet; run `lowdft train RECIPE`"):
        report.main(run)
    write_metrics(run)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    report.main(run)
    assert "Training is not finished" in text_of(run) and "<dd>8, 4 prompts" in text_of(run)


def test_access_tokens_stay_out_of_the_page(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    secret = "hf_" + "a1" * 17
    (run.folder / "recipe.yaml").write_text(f"training:\n  hub_token: abc\n  run_name: {secret}\n")
    report.main(run)
    assert secret not in text_of(run) and "abc" not in text_of(run) and "hub_token: …" in text_of(run)


def test_terminal_table(capsys):
    header, rows = evaluation_table.cells(EVALUATION)
    assert header == ["", "base", "after", "sft"]
    assert rows[0] == ["accuracy of greedy answers", "25.5 ± 2.0%", "83.0 ± 3.8%", "–"]
    assert ["log-prob of completions, nats", "-31.20", "-3.25", "-4.00"] in rows
    evaluation_table.print_table(EVALUATION)
    out = capsys.readouterr().out
    assert "25.5 ± 2.0%" in out and "56.85" in out and "3 held-out rows, 2 negatives a row" in out


def test_table_without_answers_or_negatives():
    evaluation = {"rows": 1, "negatives_per_row": 0, "systems": {"base": {"logps/positive": -1.0, "new": 2.0}}}
    assert evaluation_table.cells(evaluation)[1] == [["log-prob of completions, nats", "-1.00"], ["new", "2.00"]]
    assert evaluation_table.title(evaluation) == "1 held-out row"
