"""compare: one recipe run over a grid of settings, on shared negatives and reference -> study.json, study.md, curves.

A study is a YAML file:

    recipe: ../quickstart.yaml            # relative to the study
    output_dir: runs/studies/objectives   # one run folder a combination
    set: {training.num_train_epochs: 2}   # overrides for every run
    grid:
      training.objective: [sft, dft, dft2]
      training.seed: [0, 1, 2]
    spread: training.seed                 # the key whose values are repetitions: mean and spread over them
"""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import statistics
from pathlib import Path

from omegaconf import OmegaConf

from lowdft.errors import UserError
from lowdft.files import read_json, write_json, write_text
from lowdft.recipe import load_recipe
from lowdft.run import Run, say
from lowdft.run_folder import Product

STAGES = ("generate", "score", "train", "evaluate")
KEYS = {"recipe", "output_dir", "set", "grid", "spread"}
MEASURES = {
    "accuracy": "accuracy, %",
    "margin": "margin, nats",
    "logps/positive": "completions, nats",
    "logps/negative": "negatives, nats",
    "seconds": "training, s",
    "peak_memory_gb": "peak GB",
}


def main(path: str, overrides: list[str]) -> None:
    """Runs what is not yet run, and writes the comparison; one failing run does not stop the others.

    Raises:
        UserError: the study's file is wrong, or a run failed (told at the end, when the others are done).
    """
    study = read_study(Path(path))
    folder, failed, results = Path(study["output_dir"]), [], []
    combinations = list(itertools.product(*study["grid"].values()))
    for number, values in enumerate(combinations, 1):
        chosen = dict(zip(study["grid"], values, strict=True))
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in chosen.items())
        say(f"[{number}/{len(combinations)}] {name}")
        settings = {**study["set"], **chosen, "output_dir": str(folder / name)}
        try:
            run_one(study["recipe"], [f"{k}={v}" for k, v in settings.items()] + overrides, folder)
        except UserError as error:
            say(f"failed: {error}")
            failed.append(name)
            continue
        results.append({"settings": chosen, **measures_of(folder / name)})
    if results:
        table = tabulate(results, study["spread"])
        write_json(folder / "study.json", {"results": results, "table": table})
        write_text(folder / "study.md", markdown(table, study["spread"]))
        draw(folder / "curves.png", results, study["spread"])
        say((folder / "study.md").read_text(encoding="utf-8"))
        say(f"{folder}: study.md, study.json, curves.png")
    if failed:
        raise UserError(f"{len(failed)} of {len(combinations)} runs failed: {'; '.join(failed)}")


def read_study(path: Path) -> dict:
    """The study's keys, checked, with the recipe's path made absolute."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such study")
    study = OmegaConf.to_container(OmegaConf.load(path))
    unknown = set(study) - KEYS
    if unknown:
        raise UserError(f"{path}: {', '.join(sorted(unknown))} is not a key of a study; known are {', '.join(KEYS)}")
    for key in ("recipe", "output_dir", "grid"):
        if key not in study:
            raise UserError(f"{path}: {key} is missing")
    bad = [key for key, values in study["grid"].items() if not isinstance(values, list) or not values]
    if bad:
        raise UserError(f"{path}: grid.{bad[0]} is {study['grid'][bad[0]]!r}; wanted a list of values")
    study["recipe"] = str((path.parent / study["recipe"]).resolve())
    return {"set": {}, "spread": "training.seed", **study}


def run_one(recipe: str, overrides: list[str], study_folder: Path) -> None:
    """Walks one run up to its evaluation, with what sibling runs made from the very same things."""
    run = Run(load_recipe(recipe, overrides))
    run.check()
    for product in (run.negatives("train"), run.negatives("heldout"), run.reference, run.base_evaluation):
        borrow(product, study_folder)
    for stage in STAGES:
        importlib.import_module(f"lowdft.stages.{stage}").main(run)


def borrow(product: Product, study_folder: Path) -> None:
    """Copies a finished product of a sibling run whose manifest matches, where this run has none."""
    if product.manifest.is_file():
        return
    for manifest in sorted(study_folder.glob(f"*/{product.manifest.name}")):
        found = read_json(manifest)
        if found["done"] and found["made_from"] == product.made_from:
            shutil.copyfile(manifest.with_name(product.path.name), product.path)
            shutil.copyfile(manifest, product.manifest)
            return


def measures_of(folder: Path) -> dict:
    """Held-out metrics of the trained model and of the base, cost, and the training's curves."""
    evaluation = read_json(folder / "evaluation.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(path for name in ("adapter", "model") if (path := folder / f"{name}.manifest.json").is_file())
    cost = {"seconds": read_json(trained)["facts"]["seconds"], "peak_memory_gb": lines[-1].get("peak_memory_gb")}
    curves = {key: [line.get(key) for line in lines] for key in ("logps/positive", "logps/negative", "weights/mean")}
    systems = evaluation["systems"]
    return {"rows": evaluation["rows"], "after": systems["after"] | cost, "base": systems["base"], "curves": curves}


def tabulate(results: list[dict], spread: str) -> list[dict]:
    """One line a combination without `spread`: (mean, standard deviation, count) of every measure; the base first."""
    grouped: dict[str, list[dict]] = {"base": [results[0]["base"]]}
    for result in results:
        shown = {k.rsplit(".", 1)[-1]: v for k, v in result["settings"].items() if k != spread}
        grouped.setdefault(", ".join(f"{v}" for v in shown.values()), []).append(result["after"])
    table = []
    for name, many in grouped.items():
        line: dict = {"name": name, "runs": len(many)}
        for key in MEASURES:
            values = [m[key] for m in many if m.get(key) is not None]
            if values:
                line[key] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        table.append(line)
    return table


def markdown(table: list[dict], spread: str) -> str:
    """The table, with the spread over `spread` as ± one standard deviation."""
    keys = [key for key in MEASURES if any(key in line for line in table)]
    out = [f"| | {' | '.join(MEASURES[key] for key in keys)} | runs |", "|---" * (len(keys) + 2) + "|"]
    for line in table:
        cells = [_cell(line.get(key), 100 if key == "accuracy" else 1) for key in keys]
        out.append(f"| {line['name']} | {' | '.join(cells)} | {line['runs']} |")
    return "\n".join([*out, "", f"Mean ± standard deviation over {spread}.", ""])


def draw(path: Path, results: list[dict], spread: str) -> None:
    """Log-probabilities of completions and negatives over training, a colour a method (the paper's Figure 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    colours: dict[str, str] = {}
    for result in results:
        name = ", ".join(str(v) for k, v in result["settings"].items() if k != spread)
        label = None if name in colours else name
        colour = colours.setdefault(name, f"C{len(colours) % 10}")
        for axis, key in zip(axes, ("logps/positive", "logps/negative"), strict=True):
            points = [(i, value) for i, value in enumerate(result["curves"][key], 1) if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1)
            axis.set_title(f"log-probability of {'completions' if key.endswith('positive') else 'negatives'} (nats)")
            axis.set_xlabel("log line")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _cell(value: list | None, scale: float) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{scale * mean:.2f}" + ("" if deviation is None else f" ± {scale * deviation:.2f}")
