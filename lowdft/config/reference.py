"""Generates the recipe reference (docs) and the JSON schemas (editors) from the dataclasses of the recipe."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from lowdft.config import sections

COMMENT = re.compile(r"^    (\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)
ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.+?)(?=^    \w+(?:, \w+)*: |\Z)", re.MULTILINE | re.DOTALL)
OWN_KEYS = {"extends": "path of another recipe, relative to this one; list only the keys that differ"}


@dataclass(frozen=True)
class Key:
    """A key of one section. `hint` is its type as Python resolves it; `default` is None if the key is required."""

    name: str
    hint: object
    default: object
    required: bool
    meaning: str


def recipe_sections() -> dict[str, type]:
    """The dataclass of every section; "" is the top level of the recipe, "training" is `DFTConfig`."""
    from lowdft.config.training import DFTConfig

    found: dict[str, type] = {"": sections.Recipe}
    for name, hint in typing.get_type_hints(sections.Recipe).items():
        found |= dict.fromkeys([name], next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None))
    found = {name: section for name, section in found.items() if section is not None}
    return found | {"training": DFTConfig}


def keys(section: type) -> Iterator[Key]:
    """The keys of a section's dataclass, in the order of its fields."""
    meanings = _meanings(section)
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default == "???" or default is dataclasses.MISSING
        meaning = meanings.get(field.name) or str(field.metadata.get("help", ""))
        yield Key(field.name, hints[field.name], None if required else default, required, " ".join(meaning.split()))


def _meanings(section: type) -> dict[str, str]:
    """Each field's meaning, from the comment behind it or from the docstring's `Args`."""
    found = dict(COMMENT.findall(inspect.getsource(section)))
    arguments = inspect.cleandoc(section.__doc__ or "").partition("Args:\n")[2]
    for names, text in ARGUMENT.findall(arguments):
        found |= dict.fromkeys(names.split(", "), text)
    return found


def recipe_schema() -> dict:
    """JSON schema (draft 2020-12) of a recipe."""
    found = recipe_sections()
    top = _object(found.pop(""))
    for name, section in found.items():
        inner = _object(section)
        top["properties"][name] = {"anyOf": [inner, {"type": "null"}]} if name == "adapter" else inner
    top["properties"] |= {key: {"type": "string", "description": text} for key, text in OWN_KEYS.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lowdft recipe", **top}


def study_schema() -> dict:
    """JSON schema of a study (`lowdft compare`)."""
    properties = {key: {} for key in sections.STUDY_KEYS}
    properties |= {"recipe": {"type": "string"}, "output_dir": {"type": "string"}, "grid": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lowdft study",
        "type": "object",
        "properties": properties,
        "required": ["recipe", "output_dir", "grid"],
        "additionalProperties": False,
    }


def _object(section: type) -> dict:
    properties = {}
    for key in keys(section):
        properties[key.name] = _type(key.hint)
        if key.meaning:
            properties[key.name]["description"] = key.meaning
        if isinstance(key.default, (str, int, float, bool)):
            properties[key.name]["default"] = key.default
    text = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
    return {"type": "object", "description": text, "properties": properties, "additionalProperties": False}


def _type(hint: object) -> dict:
    """The JSON schema of a Python type; {} (any value) for other types."""
    simple = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    if hint in simple:
        return {"type": simple[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        parts = [_type(part) for part in arguments]
        return {} if {} in parts else {"anyOf": parts}
    if hint is list or origin is list:
        return {"type": "array"} | ({"items": _type(arguments[0])} if arguments else {})
    if hint is dict or origin is dict:
        return {"type": "object"}
    return {}


def as_markdown() -> str:
    """The docs page of all keys. For `training`, only those that lowdft adds to transformers' TrainingArguments."""
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    out = ["# Recipe reference", "", "Generated from the code. Required keys have no default.", ""]
    out += ["A recipe can start from another one with `extends: other.yaml` and list only the keys that differ. Any"]
    out += ["key can be overridden on the command line, as in `training.tau=0.5`. An unknown key is an error that"]
    out += ["suggests the nearest known name.", ""]
    for name, section in recipe_sections().items():
        text = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
        out += [f"## {f'`{name}`' if name else 'Top level'}", "", " ".join(text.split()), ""]
        out += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys(section):
            if name == "training" and key.name in inherited:
                continue
            default = "" if key.required else f"`{key.default}`"
            if dataclasses.is_dataclass(key.default) or (not name and key.name in recipe_sections()):
                default = "the section below"
            cells = [f"`{key.name}`", f"`{_name(key.hint)}`", default, key.meaning]
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        out.append("")
    out += ["All other fields of `training` are those of `transformers.TrainingArguments`.", ""]
    return "\n".join(out)


def _name(hint: object) -> str:
    """A type in readable form."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


if __name__ == "__main__":  # python -m lowdft.config.reference: writes the generated files of the repository
    from lowdft.files import write_json, write_text

    write_text("docs/recipe-reference.md", as_markdown())
    write_json("recipes/recipe.schema.json", recipe_schema())
    write_json("recipes/study.schema.json", study_schema())
