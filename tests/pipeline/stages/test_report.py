"""report: a small fake run folder in, one page and one picture out."""

from __future__ import annotations

import json
import math
import re
import struct

import pytest
from helpers import write_benchmark

from lowdft.config.sections import DataSection, ModelSection, Recipe
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import report
from lowdft.reporting import benchmark_table, charts, evaluation_table, figures, run_page

EVALUATION = {
    "rows": 3, "negatives_per_row": 2, "answer": "number",
    "systems": {
        "base": {"logps/positive": -31.2, "logps/negative": -40.1, "margin": 8.9, "wins": 0.62, "wins_per_token": 0.55,
                 "accuracy": 0.255, "accuracy_stderr": 0.02},
        "after": {"logps/positive": -3.25, "logps/negative": -60.1, "margin": 56.85, "wins": 1.0, "wins_per_token": 0.9,
                  "accuracy": 0.83, "accuracy_stderr": 0.0375},
        "sft": {"logps/positive": -4.0},
    },
    "per_row": {"base": {"accuracy": [0, 1, 0]}, "after": {"accuracy": [1, 1, 1]}},
    "samples": [{"example_id": "r<1>", "prompt": "9 < 10 & so?", "completion": "<b>10</b>", "base": "nine", "after": "",
                 "right": {"base": False, "after": True},
                 "negatives": [{"text": "<script>9", "base": -3.0, "after": -12.5, "weight": 0.25}]}],
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
        line = {"step": step, "loss": 40.0 - step, "learning_rate": 1e-4, "seconds": 2.0 * step,
                "logps/positive": -40.0 + step, "tokens_per_second": 100.0 * step,
                "peak_memory_gb": 1.0 + step / 8, "epoch": float(step)}  # fmt: skip
        if weight is not None:
            line |= {"logps/negative": -40.0 - step, "margin": 2.0 * step, "weights/mean": weight, "log_u/mean": -step}
            line |= {"reference/gap": 0.0125} if step == 1 else {}
        lines.append(json.dumps(line) + "\n")
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def text_of(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


def finish_evaluation(run: Run) -> None:
    run.evaluation.begin()
    (run.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    run.evaluation.finish(rows=3)


def test_page_says_what_was_trained_and_measured(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    run.negatives("train").finish(rows=4, negatives=64, empty=3, cut_at_max_new_tokens=5)
    finish_evaluation(run)
    report.main(run)
    page = text_of(run)
    for wanted in [
        "<dt>base</dt><dd>someone/tiny-llama</dd>",
        "<dt>weights</dt><dd>dense, float32</dd>",
        "<dt>objective</dt><dd>dft (arXiv 2502.18679, Eq. 7-8)</dd>",
        "<dt>hyper-parameters</dt><dd>tau 1.0, gamma 0.85, nll_weight 0.0</dd>",
        "<h1>first: dft on someone/tiny-llama</h1>",
        "<dt>rows</dt><dd>4</dd>",
        "<dt>steps</dt><dd>8, 4 prompts per step and device</dd>",
        "<dt>time</dt><dd>16 s</dd>",
        "<dt>peak memory</dt><dd>2.00 GB</dd>",
        "<dt>speed</dt><dd>500 tokens/s (median step)</dd>",
        "<dt>|policy - reference| at step 1</dt><dd>0.0125 nats</dd>",
        "<dt>negatives</dt><dd>64</dd>",
        "<dt>cut at max new tokens</dt><dd>5 (8%)</dd>",
        '<th scope="col">base</th><th scope="col">after</th><th scope="col">sft</th><th scope="col">difference</th>',
        "<td>25.5 ± 2.0%</td><td>83.0 ± 3.8%</td><td>–</td><td>+66.7 ± 33.3 points</td>",
        "3 held-out rows, 2 negatives per row",
        "load_in_4bit: false",
    ]:
        assert wanted in page, wanted
    drawn = re.findall(r'<figure class="chart" id="chart-([\w-]+)">', page)
    assert drawn == ["logps", "loss", "margin", "weights-mean", "log_u-mean", "learning_rate", "tokens_per_second",
                     "peak_memory_gb"]  # fmt: skip
    assert "Warning." not in page and "not finished" not in page and 'http-equiv="refresh' not in page


def test_page_is_self_contained_and_escapes_what_users_wrote(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    finish_evaluation(run)
    report.main(run)
    page = text_of(run)
    assert "&lt;script&gt;9" in page and "&lt;b&gt;10&lt;/b&gt;" in page and "<h3>9 &lt; 10 &amp; so?</h3>" in page
    assert "weight 0.25; log-probability -3.0 nats before, -12.5 after" in page
    assert '<span class="right">✓ right</span>' in page and "<dd><i>empty</i></dd>" in page
    assert not re.search(r"<img|@import|src=|url\(|http://|https://", page) and page.count("<script") == 1
    assert "default-src 'none'" in page  # the browser itself would stop a request


def test_answers_while_training_are_shown(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    (run.folder / "samples.jsonl").write_text('{"step": 3, "answers": ["<i>5"]}\n{"step": 6, "answers": ["4"]}\n{"st')
    report.main(run)
    assert "<summary>4 or 5?</summary>" in text_of(run)
    assert "<dt>step 3</dt><dd><pre>&lt;i&gt;5</pre></dd>" in text_of(run) and "<dt>step 6</dt>" in text_of(run)


def test_negatives_that_contribute_nothing_are_reported(tmp_path, tiny_folder, said):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run, weight=2e-4)
    report.main(run)
    warning = "The negatives contribute almost nothing: their mean weight over the last quarter of the steps is 2.0e-04"
    assert warning in text_of(run) and warning in said()
    for remedy in ("lower training.learning_rate", "larger training.tau", "harder negatives"):
        assert remedy in text_of(run)


def test_other_runs_are_drawn_beside(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    other = tmp_path / "second <run>"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 9, "loss": 1.5}\n')
    report.main(run, beside=[str(other)])
    page = text_of(run)
    assert 'value="1" checked> second &lt;run&gt;</label>' in page
    loss = page.split('id="chart-loss"')[1].split("</figure>")[0]
    assert loss.count("<g data-run=") == 2 and "second &lt;run&gt;, step 9: 1.5 nats" in loss
    with pytest.raises(UserError, match="nothing: there is no such folder; wanted a run folder"):
        report.main(run, beside=[str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no logged steps yet"):
        report.main(run, beside=[str(tmp_path / "empty")])


def test_benchmarks_are_shown_beside_the_evaluation(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    write_benchmark(run.folder)
    report.main(run)
    assert f"Benchmarks. {benchmark_table.notes(json.loads((run.folder / 'benchmark.json').read_text()))}" in text_of(
        run
    )
    assert "<td>25.00</td><td>37.50</td><td>+12.50</td><td>8</td>" in text_of(run)


def test_the_page_of_a_running_training_reloads_itself(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, training_done=False)
    write_metrics(run)
    run_page.write(run, live="training is running, step 8 of 20")
    assert '<meta http-equiv="refresh" content="15">' in text_of(run)
    [live] = re.findall('<p class="live">(.*)</p>', text_of(run))
    when, _, rest = live.partition(": training")
    assert re.fullmatch(r"As of 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", when)
    assert rest == " is running, step 8 of 20. This page reloads itself every 15 s."


def test_sft_without_an_evaluation(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, objective="sft")
    write_metrics(run, weight=None)
    report.main(run)
    page = text_of(run)
    assert page.count("<figure") == 5  # log-probabilities, loss, learning rate, speed, memory
    assert "<dd>none: sft uses no negatives</dd>" in page and "Not evaluated." in page
    assert "<dd>sft (maximum likelihood)</dd>" in page and "<h2>Samples</h2>" not in page


def test_picture_has_both_curves_and_units(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    write_metrics(run)
    report.main(run)
    png = (run.folder / "logps.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (1152, 672)
    [axes] = figures.logps(run_page.read_metrics(run.folder / "metrics.jsonl")).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "log-probability (nats)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["completions", "negatives"]
    raw = axes.lines[0]
    assert list(raw.get_xdata()) == list(range(1, 9)) and list(raw.get_ydata()) == [-39.0 + i for i in range(8)]


def test_smoothing_keeps_length_and_shortens_at_the_ends():
    """40 values: half a window is 1, so the mean of up to 3 neighbours."""
    values = [float(i % 2) for i in range(40)]
    smoothed = charts.smooth(values)
    assert len(smoothed) == 40 and smoothed[0] == 0.5 and math.isclose(smoothed[1], 1 / 3)
    assert charts.smooth([1.0, 5.0]) == [1.0, 5.0]


def test_unfinished_training_is_said_and_a_cut_off_line_skipped(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, training_done=False)
    with pytest.raises(UserError, match="has no logged steps yet; run `lowdft train RECIPE`"):
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
    assert header == ["", "base", "after", "sft", "difference"]
    assert rows[0] == ["accuracy of greedy answers", "25.5 ± 2.0%", "83.0 ± 3.8%", "–", "+66.7 ± 33.3 points"]
    assert ["log-prob of completions, nats", "-31.20", "-3.25", "-4.00", "+27.95"] in rows
    evaluation_table.print_table(EVALUATION)
    out = capsys.readouterr().out
    assert "25.5 ± 2.0%" in out and "56.85" in out and "3 held-out rows, 2 negatives per row" in out


def test_table_without_answers_or_negatives():
    evaluation = {"rows": 1, "negatives_per_row": 0, "systems": {"base": {"logps/positive": -1.0, "new": 2.0}}}
    assert evaluation_table.cells(evaluation)[1] == [["log-prob of completions, nats", "-1.00"], ["new", "2.00"]]
    assert evaluation_table.title(evaluation) == "1 held-out row"
