"""The docs build without a warning, and their code is code: YAML fits the schema, commands and Python parse."""

from __future__ import annotations

import ast
import re
import shlex

import jsonschema
import pytest
from helpers import ROOT
from omegaconf import OmegaConf

from lowdft.config import reference
from lowdft.verbs import VERBS

PAGES = sorted(ROOT.glob("docs/**/*.md")) + [ROOT / "README.md"]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(kind, text, id=f"{page.stem}-{n}")
    for page in PAGES
    for n, (kind, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("kind, text", BLOCKS)
def test_blocks(kind, text):
    """A YAML block is a recipe, a Python block parses, and `lowdft` is called with verbs that it has."""
    assert kind in ("yaml", "bash", "python", "text", "console"), kind
    if kind == "yaml":
        jsonschema.validate(OmegaConf.to_container(OmegaConf.create(text)), reference.recipe_schema())
    elif kind == "python":
        ast.parse(text)
    elif kind == "bash":
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lowdft"]:
                assert words[1] in VERBS or words[1].startswith("--"), line


def test_site_builds_without_a_warning(tmp_path):
    """`mkdocs build --strict`, offline."""
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    mkdocs.build(config)
    assert (tmp_path / "objectives" / "index.html").is_file() and (tmp_path / "search").is_dir()
    assert "listwise" in (tmp_path / "objectives" / "index.html").read_text(encoding="utf-8")


def test_links_between_pages_resolve():
    """Links of the README into the repository."""
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
