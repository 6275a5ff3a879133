"""init: a recipe that loads and inspects, from rows of several layouts."""

from __future__ import annotations

import json
import warnings

import pytest

from lowdft.cli import main
from lowdft.config.recipe import load_recipe, training_config
from lowdft.errors import UserError
from lowdft.start import init

LAYOUTS = {
    "open": ([{"prompt": f"Say {n}.", "completion": "word " * n} for n in range(1, 41)], "dft", 2, "none"),
    "numbers": ([{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(40)], "dft", 2, "number"),
    "negatives": (
        [{"prompt": f"{n}?", "completion": "yes it is", "negatives": ["no", "maybe", "why"]} for n in range(40)],
        "listwise",
        3,
        "none",
    ),
    "options": (
        [{"question": f"{n}?", "choices": ["yes", "no", "why"], "answer": n % 3} for n in range(40)],
        "dft",
        1,
        "none",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_recipe_fits_the_rows(kind, tmp_path, tiny_folder):
    rows, objective, count, answer = LAYOUTS[kind]
    data, output = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    init.main(str(tiny_folder), str(data), str(output))
    recipe = load_recipe(output)
    args = training_config(recipe)
    assert args.objective == objective and recipe.evaluation.answer == answer
    assert recipe.data.eval_rows == 4 and args.negatives_per_step == count
    assert args.max_length > args.max_prompt_length


def test_notices_of_libraries_are_not_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(init, "main", lambda *_: warnings.warn("a library's", FutureWarning, stacklevel=1))
    assert main(["init", "model", "rows.jsonl", "--output", str(tmp_path / "mine.yaml")]) == 0
    assert capsys.readouterr().err == ""


def test_an_existing_file_is_kept(tmp_path, tiny_folder):
    (tmp_path / "mine.yaml").write_text("output_dir: x\n")
    with pytest.raises(UserError, match="this file already exists"):
        init.main(str(tiny_folder), "rows.jsonl", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == "output_dir: x\n"


def test_what_a_terminal_would_obey_is_shown(tmp_path, tiny_folder, capsys):
    data, output = tmp_path / "rows\x1b[2J.jsonl", tmp_path / "mine.yaml"
    row = {"prompt": "Say it.", "completion": "word", "extra": "a column that is not used"}
    data.write_text((json.dumps(row) + "\n") * 40)
    with pytest.raises(UserError, match="is not YAML"):  # which cannot hold such a name
        init.main(str(tiny_folder), str(data), str(output))
    out = capsys.readouterr().out
    assert r"rows\x1b[2J.jsonl: " in out and "\x1b" not in out
