"""The reference of recipe keys: generated files are up to date, and every recipe and study fits its schema."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
from helpers import ROOT
from omegaconf import OmegaConf

from lowdft.config import reference
from lowdft.config.sections import ModelSection

STUDIES = sorted(ROOT.glob("recipes/studies/*.yaml"))
RECIPES = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(STUDIES) - set(ROOT.glob("recipes/launch/*.yaml")))


@pytest.fixture(scope="module")
def recipe_schema():
    return reference.recipe_schema()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_fits(path, recipe_schema):
    jsonschema.validate(OmegaConf.to_container(OmegaConf.load(path)), recipe_schema)
    assert recipe_schema["properties"]["training"]["properties"]["tau"]["description"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_fits(path):
    schema = reference.study_schema()
    jsonschema.validate(OmegaConf.to_container(OmegaConf.load(path)), schema)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    "wrong",
    [{"modle": {}}, {"model": {"name_or_path": 3}}, {"training": {"tau": "high"}}, {"data": {"eval_rows": "many"}}],
)
def test_mistakes_do_not_fit(wrong, recipe_schema):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, recipe_schema)


def test_meanings_come_from_the_code():
    """A comment behind a field, and an argument of a docstring."""
    of_model = {key.name: key for key in reference.keys(ModelSection)}
    assert (
        of_model["load_in_4bit"].meaning == "NF4 with double quantization" and of_model["load_in_4bit"].default is True
    )
    assert of_model["name_or_path"].required
    of_training = {key.name: key for key in reference.keys(reference.recipe_sections()["training"])}
    assert of_training["tau"].meaning.startswith("temperature of the discriminative likelihood")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="its tested peft and transformers have other settings")
def test_generated_files_are_up_to_date(recipe_schema):
    """`python -m lowdft.config.reference` writes them."""
    assert (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8") == reference.as_markdown()
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json.loads(json.dumps(recipe_schema))
    assert json.loads((ROOT / "recipes" / "study.schema.json").read_text()) == reference.study_schema()
