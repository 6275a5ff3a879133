"""The report page: one HTML file without external files. The template engine escapes every value."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

FOLDER = Path(__file__).parent


def render(**values: object) -> str:
    """The page of these values (see page.html.j2)."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return _environment().get_template("page.html.j2").render(style=style, script=script, **values)


@functools.cache
def _environment() -> Environment:
    """Compiles a template once per process: the live report is written again and again."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=select_autoescape(["j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
