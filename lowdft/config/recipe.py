"""Reads a recipe: a YAML file of typed sections, with overrides, checked before any model is loaded."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lowdft.config.hints import where
from lowdft.config.machine import computes_bfloat16, has_flash_attention
from lowdft.config.sections import AdapterSection, Recipe
from lowdft.config.values import check_type, check_values
from lowdft.errors import UserError
from lowdft.files import conceal, write_text
from lowdft.text import did_you_mean, nearest

UPLOADS = ("hub_", "push_to_hub", "trackio_")  # transformers' settings that send checkpoints or metrics to the Hub


def load_recipe(path: str | Path, overrides: list[str] = (), for_gpu: bool = False) -> Recipe:
    """Reads a recipe, applies `section.key=value` overrides, and checks keys, types and values.

    A recipe with `extends: other.yaml` (a path relative to the recipe) lists only what differs from that one.

    Args:
        path: a recipe, or a run folder; a run folder means the resolved recipe in it, with the folder as output_dir.
        for_gpu: `dtype: auto` becomes bfloat16, as on a current GPU, whatever this machine supports.

    Raises:
        UserError: names the recipe's key, what was found and what was wanted.
    """
    given = _given(path, overrides)
    for section in {*_sections(), "training"} - {"adapter"}:
        if given.get(section) is None:  # all of its keys are commented out
            given.pop(section, None)
    _gather_adapter_options(given)
    _refuse_unknown_keys(OmegaConf.to_container(given), Recipe, str(path), "")
    schema = OmegaConf.structured(Recipe)
    try:
        merged = OmegaConf.merge(schema, given)
        recipe, resolved = OmegaConf.to_object(merged), OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_worded(error, given)}") from error
    recipe.interpolations = dict(_interpolations(OmegaConf.to_container(given), resolved))
    check_values(recipe, str(path))
    if recipe.model.dtype == "auto":
        recipe.model.dtype = "bfloat16" if for_gpu or computes_bfloat16() else "float32"
    if recipe.negatives.backend == "auto":
        recipe.negatives.backend = "continuous" if has_flash_attention() else "padded"
    return recipe


def _worded(error: OmegaConfBaseException, given) -> str:
    """OmegaConf's error about a value, with the nearest allowed value."""
    key = error.full_key
    value = OmegaConf.select(given, key or "", throw_on_resolution_failure=False)
    section, _, field = key.rpartition(".")
    owner = _sections().get(section)
    hint = typing.get_type_hints(owner).get(field) if owner else None
    if typing.get_origin(hint) is typing.Literal:
        return f"{key} is {value!r}.{did_you_mean(str(value), typing.get_args(hint))}"
    missing = " (this key is required: give it a value)" if "MissingMandatoryValue" in type(error).__name__ else ""
    return f"{key}: {error.msg.splitlines()[0]}{missing}"


def _gather_adapter_options(given) -> None:
    """Moves fields of peft's configuration from `adapter` to `adapter.options`."""
    section = given.get("adapter")
    if OmegaConf.is_dict(section):
        known = {f.name for f in dataclasses.fields(AdapterSection)}
        options = {key: section.pop(key) for key in list(section) if key not in known}
        if options:
            section.options = OmegaConf.merge(section.get("options") or {}, options)


def output_dir_of(path: str | Path, overrides: list[str] = ()) -> str | None:
    """The output_dir of a recipe or a study, without checking anything else."""
    try:
        found = _given(path, overrides).get("output_dir")
    except OmegaConfBaseException:  # `load_recipe` will report it
        return None
    return found if isinstance(found, str) else None


def _given(path: str | Path, overrides: list[str]):
    bad = [item for item in overrides if "=" not in item]
    if bad:
        raise UserError(f"override {bad[0]!r}: wanted section.key=value, for example training.learning_rate=1e-4")
    given = _of_run_folder(Path(path)) if Path(path).is_dir() else _read(find_recipe(path))
    try:
        over = OmegaConf.from_dotlist(list(overrides))
        own, other = OmegaConf.select(given, "training.objective"), OmegaConf.select(over, "training.objective")
        if other is not None and other != own and OmegaConf.select(given, "training.objective_args") is not None:
            del given.training.objective_args  # they belong to the objective that is replaced
        return OmegaConf.merge(given, over)
    except YAMLError as error:
        reason = f"a value is not YAML ({str(error).splitlines()[0]}); put it in quotes"
    except (OmegaConfBaseException, TypeError) as error:
        reason = f"one of them has another form than the recipe's key ({str(error).splitlines()[0]})"
    raise UserError(f"overrides {' '.join(overrides)}: {reason}")


def _of_run_folder(folder: Path):
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder}: this folder has no recipe.yaml, so it is not a run folder. Give a recipe or a run folder."
        )
    return OmegaConf.merge(_read(folder / "recipe.yaml"), {"output_dir": str(folder)})


def find_recipe(path: str | Path) -> Path:
    """A recipe's file: the path itself, or a recipe that comes with lowdft, as in `lowdft run quickstart`."""
    path = Path(path)
    if path.suffix or path.exists():
        return path
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")
    shipped = {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}
    if str(path) not in shipped:
        beside = {p.name: p for p in path.parent.iterdir()} if path.parent.is_dir() else {}
        near = beside.get(nearest(path.name, beside)) or nearest(str(path), shipped)
        alone = did_you_mean(str(path), shipped) if path.parent == Path() else ""  # a name, not a path
        hint = f" Did you mean '{near}'?" if near else alone
        raise UserError(f"{path}: there is no such recipe or run folder.{hint}")
    return shipped[str(path)]


def _read(path: Path, extending: tuple[Path, ...] = ()):
    """The keys of a recipe, merged over those of the recipe that it extends."""
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe. The recipes of lowdft are in recipes/.") from None
    except Exception as error:  # yaml's own errors name the line
        raise UserError(f"{path}: is not YAML: {error}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(f"{path}: wanted sections (model, data, training, …), found {type(given).__name__}")
    other = given.pop("extends", None)
    if other is None:
        return given
    extending = (*extending, path.resolve())
    if (path.parent / str(other)).resolve() in extending:
        raise UserError(f"{path}: this recipe and {other} extend each other; remove one `extends`")
    return OmegaConf.merge(_read(path.parent / str(other), extending), given)


def rounds_of(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe of every round, each with its own folder.

    From the second round on, the model of the previous round writes the negatives, is the reference model, and is the
    starting point of training (SPIN's iteration, arXiv 2401.01335; DFT beyond one round).
    """
    last = None
    for number in range(1, recipe.rounds + 1):
        one = copy.deepcopy(recipe)
        one.rounds, one.output_dir = 1, str(Path(recipe.output_dir) / f"round-{number}")
        one.negatives.seed += number - 1
        one.training["seed"] = one.training.get("seed", 42) + number - 1
        if last is not None:
            one.negatives.adapter = last
            one.training["reference_model"] = f"adapter:{last}"
        last = str(Path(one.output_dir) / "adapter")
        yield one


def _interpolations(written: dict, resolved: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, tuple]]:
    """(path of a key, (its text with ${…}, its value)) for every value that refers to another key or the environment.

    Values from the environment are concealed in every text file that is written from now on.
    """
    for key, text in written.items():
        value, here = resolved[key], (*path, key)
        if isinstance(text, dict):
            yield from _interpolations(text, value, here)
        elif "${" in str(text):
            yield here, (text, value)
            for name in re.findall(r"\$\{\s*oc\.env:\s*(\w+)", str(text)):
                conceal(os.environ.get(name, ""), f"${{oc.env:{name}}}")


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the recipe as YAML, defaults included. References to the environment (`${oc.env:KEY}`) stay unresolved."""
    values = dataclasses.asdict(recipe)
    for keys, (text, value) in getattr(recipe, "interpolations", {}).items():
        section = values
        for key in keys[:-1]:
            section = section[key]
        if section[keys[-1]] == value:
            section[keys[-1]] = text
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(values)))


def training_config(recipe: Recipe):
    """The `DFTConfig` of a recipe (imports transformers).

    Raises:
        UserError: `training` has an unknown field, or a value that is not allowed.
    """
    import torch

    from lowdft.config.training import DFTConfig
    from lowdft.models.adapters import adapter_config

    if recipe.adapter:
        adapter_config(recipe.adapter, recipe.model.holds_4bit)
    known = [field.name for field in dataclasses.fields(DFTConfig) if field.init]
    hints = typing.get_type_hints(DFTConfig)
    for key, value in recipe.training.items():
        if key not in known:
            raise UserError(f"training.{key} is not known.{where(key, known)}")
        check_type(f"training.{key}", _whole(value), hints[key])
    if uploads := [key for key in recipe.training if key.startswith(UPLOADS)]:
        raise UserError(
            f"training.{uploads[0]} is not allowed: nothing is uploaded during training. Remove it. Afterwards, "
            "`lowdft export RECIPE --push NAME` uploads the trained adapter; it reads the Hub token from HF_TOKEN."
        )
    settings = {
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": False,
        "project": "lowdft",  # trackers show this, and one run per session
        "run_name": f"{Path(recipe.output_dir).resolve().name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
    }
    if "WORLD_SIZE" in os.environ:  # started by a launcher
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        settings["use_cpu"] = not torch.cuda.is_available()
        if deepspeed and settings["use_cpu"]:
            from lowdft.compat import without_compiled_communication

            without_compiled_communication()
        settings["bf16"] = deepspeed and recipe.model.dtype == "bfloat16"  # else DeepSpeed converts weights to float32
    settings |= {key: _whole(value) for key, value in recipe.training.items()}
    try:
        return DFTConfig(output_dir=str(Path(recipe.output_dir) / "checkpoints"), **settings)
    except (ValueError, TypeError) as error:
        named = "training" in str(error) or "objective" in str(error)
        raise UserError(str(error) if named else f"training: {error}") from error


def _whole(value: object) -> object:
    """1e3, which YAML reads as a fractional number, as a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.cache
def _sections() -> dict[str, type]:
    """The recipe's sections with fixed keys, by name."""
    hints = typing.get_type_hints(Recipe)
    kinds = {
        name: next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None)
        for name, hint in hints.items()
    }
    return {name: kind for name, kind in kinds.items() if kind}


def _refuse_unknown_keys(given: object, section: type, path: str, prefix: str) -> None:
    if not isinstance(given, dict):
        return
    known = {f.name: f for f in dataclasses.fields(section)}
    sections = _sections()
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{path}: {prefix}{key} is not a recipe key.{where(str(key), known)}")
        if section is Recipe and key in sections:
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{path}: {key} is {value!r}; wanted a section with keys")
            _refuse_unknown_keys(value, sections[key], path, f"{key}.")
