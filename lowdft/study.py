"""compare: runs one recipe over a grid of settings and writes study.json, study.md and figures.

The runs share negatives, reference scores and the base's evaluation.

A study is a YAML file:

    recipe: ../quickstart.yaml            # relative to the study
    output_dir: runs/studies/objectives   # one run folder per combination
    set: {training.num_train_epochs: 2}   # overrides for every run
    grid:
      training.objective: [sft, dft, dft2]
      training.seed: [0, 1, 2]
    spread: training.seed                 # the key whose values are repetitions; mean and spread are over them
    paper:                                # numbers from a paper, shown next to the line of that name
      dft: {GSM8K: 79.15}

An axis of the grid is either a recipe key with a list of values, or a name of your choice with cases that each set
several keys:

      method:
        dft: {training.objective: dft}
        simpo: {training.objective: simpo, training.objective_args.beta: 10}

Two SFT baselines are added to every grid, so that the comparison is fair (`baselines: false` leaves them out):

    sft_learning_rates: [2e-4, 4e-4]      # "sft, tuned": the best of these on rows split off the training rows
    tune_rows: 200                        # how many rows are split off

The second, "sft, equal time", uses so many epochs that it takes as long as the slowest line of the grid.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import statistics
import traceback
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf

from lowdft.config.doors import CLOSED, Doors
from lowdft.config.recipe import load_recipe, training_config
from lowdft.config.sections import STUDY_KEYS as KEYS
from lowdft.config.sections import Recipe
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError
from lowdft.files import locked, read_json, replacing, write_error, write_json, write_text
from lowdft.pipeline.artifact import Product
from lowdft.pipeline.context import Run, say
from lowdft.reporting.benchmark_table import of_study
from lowdft.reporting.figures import draw, label
from lowdft.reporting.study_table import EQUAL_TIME, TUNED, best, markdown, tabulate
from lowdft.training.metrics import reset_peak_memory

STAGES = ("generate", "score", "train", "evaluate")


def main(path: str, overrides: list[str], doors: Doors = CLOSED) -> None:
    """Runs every combination that is not done yet, and writes the comparison. A failing run does not stop the others.

    Raises:
        UserError: the study file is invalid, or runs failed (raised at the end, when the others are done).
    """
    keys = read_study(Path(path))
    with locked(keys["output_dir"]):
        _run_all(Study(keys, overrides, doors))


def _run_all(study: Study) -> None:
    rate = study.tuned_rate() if study.keys["baselines"] else None
    runs = combinations(study.keys)
    results = []
    for number, (chosen, settings) in enumerate(runs, 1):
        say(f"[{number}/{len(runs)}] {folder_name(chosen)}")
        results += study.run(chosen, settings)
    figures_of = list(results)
    if rate is not None and results:
        tuned = study.baseline(TUNED, {"training.learning_rate": rate}, results)
        epochs = study.equal_epochs(results, tuned)
        equal = study.baseline(EQUAL_TIME, {"training.learning_rate": rate} | epochs, results) if epochs else []
        results = tuned + equal + results
    if results:
        study.write(results, figures_of)
    if study.failed:
        raise UserError(f"runs that failed: {'; '.join(study.failed)}")


class Study:
    """A running study: its checked `keys`, its folder, and the names of the runs that `failed`."""

    def __init__(self, keys: dict, overrides: list[str], doors: Doors):
        self.keys, self.overrides, self.doors = keys, overrides, doors
        self.folder = Path(keys["output_dir"])
        self.failed: list[str] = []

    def run(self, chosen: dict, settings: dict, name: str = "") -> list[dict]:
        """The result of one run in a list, which is empty if the run failed; `name` is that of its folder."""
        name = name or folder_name(chosen)
        settings = settings | {"output_dir": str(self.folder / name)}
        try:
            run_one(self.keys["recipe"], as_overrides(settings) + self.overrides, self.folder, self.doors)
        except Exception as error:
            known = isinstance(error, UserError) or write_error(None, error)
            say(f"failed: {error if known else f'{type(error).__name__}: {error}'}")
            if not known:
                write_text(self.folder / name / "error.txt", traceback.format_exc())
            self.failed.append(name)
            return []
        return [{"settings": chosen, "overrides": settings, **measures_of(self.folder / name)}]

    def tuned_rate(self) -> float | None:
        """SFT's best learning rate on `tune_rows` of the training rows; the recipe's if the study lists none."""
        rates = self.keys["sft_learning_rates"]
        if len(rates) < 2:
            return rates[0] if rates else self._recipe({}).training.get("learning_rate", DFTConfig.learning_rate)
        found = {}
        for rate in rates:
            say(f"tuning SFT: learning rate {rate:g}")
            held = {"data.tune_rows": self.keys["tune_rows"]}
            settings = self.keys["set"] | held | {"training.objective": "sft", "training.learning_rate": rate}
            for result in self.run({"tune": "sft", "training.learning_rate": rate}, settings):
                found[rate] = result["after"]
        if not found:
            return None
        rate = best(found)
        say(f"SFT's learning rate: {rate:g}, the best of {', '.join(f'{r:g}' for r in found)} on training rows")
        return rate

    def baseline(self, name: str, settings: dict, results: list[dict]) -> list[dict]:
        """SFT runs with these settings, one per repetition. If the grid has an identical run, it is used instead."""
        spread, out = self.keys["spread"], []
        for value in self.keys["grid"].get(spread, [None]):
            again = {} if value is None else {spread: value}
            own = self.keys["set"] | {"training.objective": "sft"} | settings | again
            chosen = {"baseline": name} | again
            same = [one for one in results if self._recipe(one["overrides"]) == self._recipe(own)]
            say(f"{name}{f', {value}' if again else ''}" + (": the same as a run of the grid" if same else ""))
            out += [same[0] | {"settings": chosen}] if same else self.run(chosen, own, folder_name(chosen | settings))
        return out

    def equal_epochs(self, results: list[dict], tuned: list[dict]) -> dict:
        """The epochs (or steps) with which SFT takes as long as the grid's slowest line, from measured times.

        Empty without tuned SFT runs. If no line is slower than tuned SFT, that is already SFT at equal time.
        """
        if not tuned:
            return {}
        lines: dict[str, list[float]] = {}
        for one in results:
            lines.setdefault(label(one["settings"], self.keys["spread"]), []).append(one["after"]["seconds"])
        slowest = max(map(statistics.mean, lines.values()))
        times = max(1.0, slowest / statistics.mean(one["after"]["seconds"] for one in tuned))
        args = training_config(self._recipe(self.keys["set"]))
        if args.max_steps > 0:
            return {"training.max_steps": math.ceil(times * args.max_steps)}
        return {"training.num_train_epochs": math.ceil(10 * times * args.num_train_epochs) / 10}

    def write(self, results: list[dict], figures_of: list[dict]) -> None:
        """Writes study.json, study.md and the figures."""
        spread, folder = self.keys["spread"], self.folder
        table = tabulate(results, spread, self.keys["paper"])
        write_json(folder / "study.json", {"results": results, "table": table})
        measured = [(label(one["settings"], spread), one["benchmarks"]) for one in results if one["benchmarks"]]
        write_text(folder / "study.md", markdown(table, spread) + (f"\n{of_study(measured)}" if measured else ""))
        drawn = draw(folder, figures_of, table, spread)
        say((folder / "study.md").read_text(encoding="utf-8"))
        say(f"{folder}: {', '.join(['study.md', 'study.json', *drawn])}")

    def _recipe(self, settings: dict) -> Recipe:
        return load_recipe(self.keys["recipe"], as_overrides(settings | {"output_dir": ""}) + self.overrides)


def read_study(path: Path) -> dict:
    """The study's keys, checked, with the recipe's path made absolute."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such study")
    study = OmegaConf.to_container(OmegaConf.load(path))
    unknown = set(study) - set(KEYS)
    if unknown:
        raise UserError(f"{path}: {', '.join(sorted(unknown))} is not a study key; the keys are {', '.join(KEYS)}")
    for key in ("recipe", "output_dir", "grid"):
        if key not in study:
            raise UserError(f"{path}: {key} is missing")
    for key, values in study["grid"].items():
        cases = isinstance(values, dict) and all(isinstance(case, dict) for case in values.values())
        if not values or not (isinstance(values, list) or cases):
            raise UserError(f"{path}: grid.{key} is {values!r}; wanted a list of values, or cases with keys and values")
    study["recipe"] = str((path.parent / study["recipe"]).resolve())
    defaults = {"set": {}, "spread": "training.seed", "paper": {}, "baselines": True, "sft_learning_rates": []}
    study = defaults | {"tune_rows": 200} | study
    if not isinstance(study["baselines"], bool):
        raise UserError(f"{path}: baselines is {study['baselines']!r}; wanted true or false")
    rates = study["sft_learning_rates"]
    if not isinstance(rates, list) or not all(isinstance(rate, float) and rate > 0 for rate in rates):
        raise UserError(f"{path}: sft_learning_rates is {rates!r}; wanted a list of numbers above 0, such as 4e-4")
    names = {"base", *(label(chosen, study["spread"]) for chosen, _ in combinations(study))}
    names |= {TUNED, EQUAL_TIME} if study["baselines"] else set()
    stray = [name for name in study["paper"] if name not in names]
    if stray:
        raise UserError(f"{path}: paper.{stray[0]} is not a line of the table; they are {', '.join(sorted(names))}")
    return study


def combinations(study: dict) -> list[tuple[dict, dict]]:
    """Every combination of the grid: the choice on each axis, and all overrides that result from it."""
    axes = [
        [(axis, name, case) for name, case in values.items()]
        if isinstance(values, dict)
        else [(axis, value, {axis: value}) for value in values]
        for axis, values in study["grid"].items()
    ]
    out = []
    for picked in itertools.product(*axes):
        settings = dict(study["set"])
        for _, _, case in picked:
            settings |= case
        out.append(({axis: value for axis, value, _ in picked}, settings))
    return out


def folder_name(chosen: dict) -> str:
    """The name of a combination's run folder within the study's folder."""
    return ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in chosen.items())


def as_overrides(settings: dict) -> list[str]:
    """Settings as overrides of a recipe: `key=value`, with the value in YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_one(recipe: str, overrides: list[str], study_folder: Path, doors: Doors = CLOSED) -> None:
    """Runs one combination up to its evaluation, copying artifacts that sibling runs made with identical settings."""
    one = load_recipe(recipe, overrides)
    doors.check(one)
    with locked(one.output_dir):
        run = Run(one)
        run.trust_checkpoint, run.evaluation_follows = doors.trust_checkpoint, True
        run.check()
        for product in (run.negatives("train"), run.negatives("heldout"), run.reference, run.base_evaluation):
            borrow(product, study_folder)
        for stage in STAGES:
            if stage == "train":
                reset_peak_memory()
            importlib.import_module(f"lowdft.pipeline.stages.{stage}").main(run)
        if one.evaluation.benchmarks:
            borrow_benchmarks(run.folder, study_folder)
            importlib.import_module("lowdft.pipeline.stages.benchmark").main(run)


def borrow_benchmarks(folder: Path, study_folder: Path) -> None:
    """Copies the base's benchmark results from sibling runs; the file names identify what was measured."""
    for path in study_folder.glob("*/benchmarks/*/base-*.json"):
        target = folder / path.relative_to(path.parents[2])
        if not target.is_file():
            write_text(target, path.read_text(encoding="utf-8"))


def borrow(product: Product, study_folder: Path) -> None:
    """Copies a finished, undamaged product with a matching manifest from a sibling run, if this run has none."""
    if product.manifest.is_file():
        return
    for manifest in sorted(study_folder.glob(f"*/{product.manifest.name}")):
        theirs = Product(manifest.with_name(product.path.name), product.made_from)
        with suppress(UserError):  # made with other settings, or damaged
            if theirs.is_done():
                product.begin()  # so that an interrupted copy is repeated
                with replacing(product.path) as temporary:
                    shutil.copyfile(theirs.path, temporary)
                product.finish(**theirs.facts())
                return


def measures_of(folder: Path) -> dict:
    """Held-out metrics of the trained model and of the base, the cost, and the curves of training.

    The cost in seconds includes training, negatives and reference scores (even if a sibling run made these), but not
    the evaluation.
    """
    evaluation = read_json(folder / "evaluation.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [Product(folder / name, {}) for name in ("adapter", "model", "negatives.parquet", "reference.parquet")]
    seconds = sum(one.facts().get("seconds") or 0.0 for one in made if one.manifest.is_file())
    cost = {"seconds": seconds, "peak_memory_gb": lines[-1].get("peak_memory_gb")}
    curves = {key: [line.get(key) for line in lines] for key in ("logps/positive", "logps/negative", "weights/mean")}
    systems = evaluation["systems"]
    return {
        "rows": evaluation["rows"],
        "after": systems["after"] | cost,
        "base": systems["base"],
        "per_row": evaluation["per_row"]["after"],
        "curves": curves,
        "benchmarks": read_json(folder / "benchmark.json") if (folder / "benchmark.json").is_file() else None,
    }
