"""report: what was trained and what came of it, on one page -> report.html and logps.png."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from io import StringIO

from lowdft import __version__, models
from lowdft.errors import UserError
from lowdft.files import digest_of, read_json, replacing, write_text
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.metrics_file import mend, read_lines
from lowdft.reporting import evaluation_table
from lowdft.training.checkpoints import newest_whole

INK = "#010203"  # drawn in this colour, then replaced by the page's own, light or dark
BLUE, ORANGE = "#2f80c8", "#dd6b20"
SPENT = 0.01  # mean weight under which the negatives no longer pull
SHOWN_SAMPLES = 8
FONTS = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "lowdft"}


def main(run: Run) -> None:
    """Writes both files; says in words when the weights of the negatives have died.

    Raises:
        UserError: nothing was trained yet, or it was trained with other settings than the recipe's.
    """
    finished = run.training.is_done()
    steps = read_metrics(run, finished)
    evaluation = None
    if (run.folder / "evaluation.json").is_file() and run.evaluation.is_done():
        evaluation = read_json(run.folder / "evaluation.json")
    with replacing(run.folder / "logps.png") as temporary:
        logps_figure(steps, size=(7.2, 4.2)).savefig(temporary, format="png", dpi=160, facecolor="white")
    write_text(run.folder / "report.html", page(run, steps, evaluation, finished))
    if warning := spent(steps):
        say(f"warning: {warning}")
    say(f"{run.folder / 'report.html'}: written, with {run.folder / 'logps.png'}")


def read_metrics(run: Run, finished: bool) -> list[dict]:
    """The logged steps. Those that a finished training lost are taken from its last checkpoint, as far as it has them.

    Raises:
        UserError: nothing was trained yet.
    """
    path = run.folder / "metrics.jsonl"
    if finished:
        noted = run.training.facts().get("metrics")
        if noted and not (path.is_file() and digest_of(path) == noted):
            mend(path, newest_whole(run.args.output_dir), resuming=False)
            say(f"warning: {path}: is not what training wrote (changed, cut or deleted since); curves may lack steps")
    steps = read_lines(path)
    if not steps and not finished:
        raise UserError(f"{path}: holds no step yet; run `lowdft train RECIPE` first, or `lowdft run RECIPE`")
    return steps


def spent(steps: list[dict]) -> str | None:
    """A warning when the weights of the last quarter of steps are too small for the negatives to matter."""
    values = [step["weights/mean"] for step in steps[-max(1, len(steps) // 4) :] if "weights/mean" in step]
    mean = sum(values) / len(values) if values else 1.0
    if mean >= SPENT:
        return None
    return (f"the negatives no longer pull: their mean weight over the last quarter of the steps is {mean:.1e} "
            f"(under {SPENT}). From there DFT is SFT with a bill. Try a lower training.learning_rate, a larger "
            "training.tau, or harder negatives (closer to the completions).")  # fmt: skip


# ---- curves -------------------------------------------------------------------------------------------------------


def logps_figure(steps: list[dict], size: tuple[float, float] = (5.6, 3.4)):
    """Figure 3 of the paper: mean log-probabilities of completions and negatives over the steps."""
    lines = {"completions (positives)": ("logps/positive", BLUE), "negatives": ("logps/negative", ORANGE)}
    return curve(steps, lines, "Mean log-probability of a sequence", "log-probability (nats)", size)


def curve(steps: list[dict], lines: dict[str, tuple[str, str]], title: str, unit: str, size=(5.6, 3.4), log=False):
    """One figure: each metric smoothed, with its raw curve faint behind; `lines`: label -> (metric, colour)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with rc_context(FONTS):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        lines = {k: v for k, v in lines.items() if any(v[0] in step for step in steps)}
        for label, (metric, color) in lines.items():
            points = [(s["step"], s[metric]) for s in steps if metric in s]
            x, y = [p[0] for p in points], [max(p[1], 1e-30) if log else p[1] for p in points]
            axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(x, smooth(y), color=color, linewidth=1.8, label=label, marker="o" if len(x) == 1 else None)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.axhline(SPENT, color=INK, linewidth=0.8, linestyle=":", label=f"{SPENT}: below, no more pull")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        axes.set_xlabel("optimizer step", color=INK)
        axes.set_ylabel(unit, color=INK)
        axes.tick_params(colors=INK, which="both")
        axes.grid(alpha=0.2, linewidth=0.6, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        if len(lines) > 1 or log:
            axes.legend(frameon=False, labelcolor=INK)
    return figure


def smooth(values: list[float]) -> list[float]:
    """A centred moving mean over about a twentieth of the curve; shorter at both ends."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def curves(run: Run, steps: list[dict]) -> Iterable[str]:
    """Every curve of the page as inline SVG that takes the page's text colour."""
    from matplotlib import rc_context

    score = "nats a token" if run.objective.per_token else "nats"
    figures = [("log-probabilities", logps_figure(steps))]
    for metric, title, unit, log in [
        ("margin", "Margin: completion over its negatives", f"margin ({score})", False),
        ("weights/mean", "Mean weight (omega) of a negative", "weight (log scale)", True),
        ("loss", "Loss", "loss (nats)", False),
        ("log_u/mean", "Moving average, mean over the examples", "log_u (nats)", False),
    ]:
        if any(metric in step for step in steps):
            figures.append((metric, curve(steps, {metric: (metric, BLUE)}, title, unit, log=log)))
    for name, figure in figures:
        text = StringIO()
        with rc_context(FONTS):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue().replace(INK, "currentColor")
        yield f'<figure role="img" aria-label="{escape(name)} over the steps">{svg[svg.index("<svg") :]}</figure>'


# ---- page ---------------------------------------------------------------------------------------------------------


def page(run: Run, steps: list[dict], evaluation: dict | None, finished: bool = True) -> str:
    """The whole of report.html."""
    title = escape(f"{run.folder.resolve().name}: {run.objective.name} on {_base(run)}")
    warning = spent(steps)
    recipe = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    parts = [
        f"<h1>{title}</h1>",
        "" if finished else "<p class=warning>Training is not finished; this is what there is so far.</p>",
        f"<p class=warning>Warning: {escape(warning)}</p>" if warning else "",
        html_pairs(training_facts(run, steps)),
        "<h2>Evaluation</h2>", html_evaluation(evaluation),
        "<h2>Curves</h2><p class=note>Smoothed; the raw curve faint behind.</p>",
        f"<div class=curves>{''.join(curves(run, steps))}</div>",
        "<h2>Negatives</h2>", html_pairs(negative_facts(run)),
        "<h2>Samples</h2>" + html_samples(evaluation) if evaluation and evaluation["samples"] else "",
        f"<h2>Recipe</h2><details><summary>resolved, defaults included</summary><pre>{_masked(recipe)}</pre></details>",
        f"<footer>lowdft {__version__}: Discriminative Fine-Tuning, arXiv 2502.18679</footer>",
    ]  # fmt: skip
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    body = "".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def training_facts(run: Run, steps: list[dict]) -> dict[str, object]:
    """What was trained, how, and what it took."""
    recipe, args = run.recipe, run.args
    adapter = recipe.adapter
    hyperparameters = ", ".join(f"{k} {v}" for k, v in args.hyperparameters().items())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    speeds = sorted(step["tokens_per_second"] for step in steps if "tokens_per_second" in step)
    memory = [step["peak_memory_gb"] for step in steps if "peak_memory_gb" in step]
    first, last = (steps[0], steps[-1]) if steps else ({}, {})  # the lines of a finished training may be lost
    gap = first.get("reference/gap")
    facts = {
        "base": _base(run) + (f" @ {run.source.revision}" if run.source.revision else ""),
        "weights": "4 bit (NF4, double quantization)" if recipe.model.load_in_4bit else f"dense, {recipe.model.dtype}",
        "trained": f"LoRA, r {adapter.r}, alpha {adapter.alpha}, dropout {adapter.dropout}, on {adapter.target_modules}"
        if adapter else "all parameters",
        "objective": f"{run.objective.name} ({run.objective.source})",
        "hyper-parameters": hyperparameters or None,
        "negatives a prompt and step": args.negatives_per_step if run.objective.uses_negatives else None,
        "rows": len(run.examples("train")),
        "steps": f"{last.get('step', 'unknown')}, {batch} prompts a step and device",
        "epochs": f"{last['epoch']:g}" if "epoch" in last else None,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "peak memory": f"{max(memory):.2f} GB" if memory else None,
        "speed": f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median step)" if speeds else None,
        "|policy - reference| at step 1": f"{gap:.3g} nats" if gap is not None else None,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def negative_facts(run: Run) -> dict[str, object]:
    """Where the negatives come from and how those that the base wrote ended."""
    if not run.objective.uses_negatives:
        return {"source": f"none: {run.objective.name} uses no negatives"}
    if run.ready_negatives():
        return {"source": "the rows bring their own"}
    section = run.recipe.negatives
    sampling = f"temperature {section.temperature:g}, top_p {section.top_p:g}, top_k {section.top_k}, " \
        f"at most {section.max_new_tokens} tokens, seed {section.seed}"  # fmt: skip
    facts: dict[str, object] = {"source": f"written by the base, strategy {section.strategy}", "sampling": sampling}
    product = run.negatives("train")
    counts = product.facts() if product.manifest.is_file() else {}
    return facts | {name.replace("_", " "): value for name, value in counts.items()}


def html_pairs(pairs: dict[str, object]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs.items()) + "</dl>"


def html_evaluation(evaluation: dict | None) -> str:
    """The systems side by side."""
    if evaluation is None:
        return "<p class=note>Not evaluated.</p>"
    header, rows = evaluation_table.cells(evaluation)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    caption = f"<caption>{escape(evaluation_table.title(evaluation))}</caption>"
    return f"<div class=wide><table>{caption}<tr>{head}</tr>{body}</table></div>"


def html_samples(evaluation: dict) -> str:
    """Held-out rows: prompt, completion, a negative, and the greedy answer of every system that gave one."""
    names = ["prompt", "completion", *(["negative"] if evaluation["negatives_per_row"] else []), *evaluation["systems"]]
    out = []
    for sample in evaluation["samples"][:SHOWN_SAMPLES]:
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd><pre>{escape(sample[name]) or '<i>empty</i>'}</pre></dd>"
            for name in names
            if name in sample
        )
        out.append(f"<article><h3>{escape(sample['example_id'])}</h3><dl>{rows}</dl></article>")
    return "".join(out)


def _base(run: Run) -> str:
    return models.public_name(run.source, run.recipe.model)


def _masked(recipe: str) -> str:
    """The recipe without access tokens."""
    return escape(re.sub(r"(?m)^(\s*\w*_token: )\S+$", r"\1…", re.sub(r"\bhf_\w{16,}", "hf_…", recipe)))


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --dim: #a2a2a2; } }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1.2rem; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#fff, #16181b); color: light-dark(#1b1d20, #e4e5e7); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; } h3 { font-size: .85rem; color: var(--dim); }
h1, h2, h3 { font-weight: 600; overflow-wrap: anywhere; } .note, footer, dt, caption { color: var(--dim); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; } dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } .wide { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } article { border-top: 1px solid var(--line); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
details pre { padding: 1rem; background: var(--soft); } summary { cursor: pointer; }
.warning { border-left: 4px solid #dd6b20; padding: .6rem 1rem; background: #dd6b2018; }
footer { margin-top: 3rem; font-size: .85rem; }
"""
