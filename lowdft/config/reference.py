"""Every key of a recipe with its type, default and meaning, read from the dataclasses: for the docs and for editors."""

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
OWN_KEYS = {"extends": "another recipe, relative to this one; say only what differs from it"}


@dataclass(frozen=True)
class Key:
    """A key of one section. `hint` is its type as Python resolves it; `default` is None where the key is required."""

    name: str
    hint: object
    default: object
    required: bool
    meaning: str


def recipe_sections() -> dict[str, type]:
    """The dataclass of every section, "" being the recipe's top level and "training" `DFTConfig`."""
    from lowdft.config.training import DFTConfig

    found: dict[str, type] = {"": sections.Recipe}
    for name, hint in typing.get_type_hints(sections.Recipe).items():
        of_section = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        found |= {name: part for part in of_section}
    return found | {"training": DFTConfig}


def keys(section: type) -> Iterator[Key]:
    """The keys of a section's dataclass, in its order."""
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
    """From the comment behind each field, or from the docstring's arguments."""
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
    from lowdft.study import KEYS

    properties = {key: {} for key in KEYS}
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
    """The JSON schema of a Python type; anything where it says nothing."""
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
