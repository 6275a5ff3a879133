"""Checks the values of a recipe's keys before anything is loaded."""

from __future__ import annotations

import types
import typing

from lowdft.config.sections import DataSection, Recipe
from lowdft.errors import UserError


def check_values(recipe: Recipe, path: str) -> None:
    """Raises UserError for a value that is not allowed, or for keys that contradict each other."""
    taken = [name for name in recipe.evaluation.compare if name in ("", "base", "after")]
    if taken:
        raise UserError(f"{path}: evaluation.compare.{taken[0]}: this name is reserved; choose another one")
    unshown = [name for name in recipe.evaluation.compare if not name.isprintable()]
    if unshown:
        raise UserError(f"{path}: evaluation.compare has the name {unshown[0]!r}; wanted printable characters only")
    if recipe.model.dequantize and not recipe.model.load_in_4bit:
        raise UserError(f"{path}: model.dequantize needs model.load_in_4bit: true; this base is not quantized")
    if recipe.model.dequantize and recipe.adapter is None:
        raise UserError(
            f"{path}: model.dequantize needs an adapter; to train all parameters, set model.load_in_4bit: false"
        )
    n = recipe.negatives
    if "" in n.stop:
        raise UserError(f"{path}: negatives.stop is {n.stop}; wanted texts that are not empty")
    if n.strategy == "custom" and "{prompt}" not in (n.template or ""):
        raise UserError(f"{path}: negatives.template is {n.template!r}; strategy custom needs a text with {{prompt}}")
    _check_data_section(recipe.data, path)
    if recipe.evaluation.answer == "regex" and not recipe.evaluation.pattern:
        raise UserError(f"{path}: evaluation.pattern is missing; answer regex needs one, with a group for the answer")
    at_least = {
        "rounds": (recipe.rounds, 1),
        "negatives.temperature": (n.temperature, 0),
        "negatives.top_k": (n.top_k, 0),
        "negatives.max_new_tokens": (n.max_new_tokens, 1),
        "negatives.batch_size": (n.batch_size, 1),
        "negatives.shots": (n.shots, 1),
        "negatives.per_prompt": (n.per_prompt, 1),
        "negatives.eval_per_prompt": (n.eval_per_prompt, 1),
        "negatives.resample": (n.resample, 0),
        "data.train_rows": (recipe.data.train_rows, 1),
        "data.eval_rows": (recipe.data.eval_rows, 0),
        "data.tune_rows": (recipe.data.tune_rows, 0),
        "adapter.r": (recipe.adapter and recipe.adapter.r, 1),
        "evaluation.max_new_tokens": (recipe.evaluation.max_new_tokens, 1),
        "evaluation.batch_size": (recipe.evaluation.batch_size, 1),
        "evaluation.samples_every": (recipe.evaluation.samples_every, 0),
        "evaluation.benchmark_limit": (recipe.evaluation.benchmark_limit or 1, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and not value >= least:
            raise UserError(f"{path}: {key} is {value}; wanted {least} or more")
    if not 0 < n.top_p <= 1:
        raise UserError(f"{path}: negatives.top_p is {n.top_p}; wanted a number in (0, 1]")
    if recipe.adapter and not 0 <= recipe.adapter.dropout < 1:
        raise UserError(f"{path}: adapter.dropout is {recipe.adapter.dropout}; wanted a number in [0, 1)")
    if not 0 < n.gpu_memory_utilization <= 1:
        found = n.gpu_memory_utilization
        raise UserError(f"{path}: negatives.gpu_memory_utilization is {found}; wanted a share in (0, 1]")


def _check_data_section(data: DataSection, path: str) -> None:
    if data.prompt_template is not None and "{prompt}" not in data.prompt_template:
        raise UserError(f"{path}: data.prompt_template is {data.prompt_template!r}; wanted a text with {{prompt}}")
    labels = data.labels
    if labels is None or labels == "auto":
        return
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(labels) or len(labels) < 2:
        raise UserError(f"{path}: data.labels is {labels!r}; wanted auto, or a list of two or more different texts")


def check_type(key: str, value: object, hint: object) -> None:
    """Raises UserError for a value of another type than a library says: it would fail later, or pass for true.

    Args:
        hint: a type as annotations have it; of types that are not plain, every value is allowed.
    """
    if not _fits(value, hint):
        raise UserError(f"{key} is {value!r}; wanted {_in_words(hint)}")


def _fits(value: object, hint: object) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        open_ended = [part.partition("[")[0] for part in parts if "[" in str(part)]  # pissa_niter_[number of iters]
        return value in parts or str(value).startswith(tuple(open_ended))
    if origin in (list, tuple, set):
        return isinstance(value, list) and (len(parts) != 1 or all(_fits(one, parts[0]) for one in value))
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, list, dict, type(None)) else True


def _in_words(hint: object) -> str:
    if hint is type(None):
        return "null"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, parts))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    return getattr(hint, "__name__", str(hint))
