"""Recipes: numbers, overrides, and errors that name the key."""

from __future__ import annotations

import re

import pytest
import yaml

from lowdft.cli import main
from lowdft.config.recipe import load_recipe, save_recipe, training_config
from lowdft.errors import UserError

MINIMAL = "output_dir: out\nmodel: {name_or_path: owner/name}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def write(tmp_path):
    def writer(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return writer


def test_scientific_notation_is_a_number(write):
    recipe = load_recipe(write(MINIMAL + "training: {learning_rate: 5e-5}\n"), ["training.weight_decay=1e-2"])
    assert recipe.training == {"learning_rate": 5e-5, "weight_decay": 1e-2}
    assert training_config(recipe).learning_rate == 5e-5


def test_overrides_reach_sections(write):
    recipe = load_recipe(write(MINIMAL), ["negatives.temperature=1.5", "adapter=null", "data.columns.prompt=q"])
    assert (recipe.negatives.temperature, recipe.adapter, recipe.data.columns) == (1.5, None, {"prompt": "q"})


@pytest.mark.parametrize("flash, on_gpu", [(False, "padded"), (True, "continuous")])
def test_the_sampling_backend_follows_from_the_machine(write, monkeypatch, flash, on_gpu):
    """Padded on a CPU; a run folder and an identity hold what was chosen, and what a recipe names stays."""
    auto = lambda *overrides: load_recipe(write(MINIMAL), list(overrides)).negatives.backend  # noqa: E731
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert auto() == auto("negatives.backend=auto") == "padded"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    assert auto() == on_gpu
    assert auto("negatives.backend=padded") == "padded" and auto("negatives.backend=vllm") == "vllm"


def test_another_objective_leaves_the_hyperparameters_of_the_recipes_own(write):
    path = write(MINIMAL + "training: {objective: listwise, objective_args: {per_token: false}}\n")
    assert "objective_args" not in load_recipe(path, ["training.objective=sft"]).training
    assert load_recipe(path, ["training.objective=listwise"]).training["objective_args"] == {"per_token": False}
    given = ["training.objective=dft", "training.objective_args={tau: 2.0}"]
    assert load_recipe(path, given).training["objective_args"] == {"tau": 2.0}


@pytest.mark.parametrize(
    "extra, words",
    [
        ("negative: {top_k: 5}", "negative is not a recipe key. Did you mean 'negatives'"),
        ("negatives: {topk: 5}", "negatives.topk is not a recipe key. Did you mean 'top_k'"),
        ("negatives: {top_k: many}", "negatives.top_k"),
        ("negatives: {strategy: bad_sistem}", "Did you mean 'bad_system'"),
        ("negatives: {strategy: custom}", "negatives.template is None"),
        ("negatives: {stop: ['.', '']}", "negatives.stop is .*wanted texts that are not empty"),
        ("negatives: {top_p: 0}", "negatives.top_p is 0.0; wanted a number in"),
        ("negatives: {temperature: .nan}", "negatives.temperature is nan; wanted 0 or more"),
        ("negatives: {per_prompt: 0}", "negatives.per_prompt is 0; wanted 1 or more"),
        ("negatives: {resample: -1}", "negatives.resample is -1; wanted 0 or more"),
        ("adapter: {r: 0}", "adapter.r is 0; wanted 1 or more"),
        ("adapter: {dropout: 2}", "adapter.dropout is 2.0; wanted a number in"),
        ("model: 7", "model is 7; wanted a section"),
        (
            "data: {train: a, max_length: 5}",
            "data.max_length is not a recipe key. Use training.max_length. All keys",
        ),
        ("seed: 5", "seed is not a recipe key. Use negatives.seed or training.seed"),
        ("lora: {r: 5}", "lora is not a recipe key. Use the section adapter. .*docs/recipe-reference.md"),
        ("model: {name_or_path: a, load_in_8bit: true}", "8 bit is not supported. All keys: docs/recipe-reference.md"),
        ("evaluation: {answer: regex}", "evaluation.pattern is missing"),
        (
            "model: {name_or_path: a/b, dequantize: true, load_in_4bit: false}",
            "model.dequantize needs model.load_in_4bit: true",
        ),
        ("model: {name_or_path: a/b, dequantize: true}\nadapter: null", "model.dequantize needs an adapter"),
    ],
)
def test_errors_name_the_key(write, extra, words):
    base = {k: v for k, v in yaml.safe_load(MINIMAL).items() if not extra.startswith(k + ":")}
    with pytest.raises(UserError, match=words):
        load_recipe(write(yaml.safe_dump(base) + extra + "\n"))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("learning_rat", 1, "training.learning_rat is not known. Did you mean 'learning_rate'"),
        ("learning_rate", "fast", "training.learning_rate is 'fast'; wanted float"),
        ("objective", "dtf", "objective 'dtf' is unknown.*Did you mean 'dft'"),
        ("beta", 0.1, "training.beta is not known. Use training.objective_args: {beta: …}. .*docs/from-trl.md"),
        ("warmup_ratio", 0.1, "Use training.warmup_steps; below 1 it is a share"),
        ("r", 8, "training.r is not known. Use adapter.r. All keys: docs/recipe-reference.md"),
        ("packing", True, "training.packing is not known. Packed rows are built in; remove it"),
        ("neftune_noise_alpha", 5.0, "lowdft does not support it; docs/from-trl.md says why"),
        ("gamma", 1.5, r"training.gamma is 1.5; wanted a number in \(0, 1\]"),
        ("reference", "sometimes", "training.reference is 'sometimes'; wanted precomputed or online"),
        ("log_u_init", "zero", "training.log_u_init is 'zero'; wanted a number or first_batch"),
        ("objective_args", {"beta": 1}, r"training.objective_args is \['beta'\]"),
    ],
)
def test_training_errors_name_the_key(write, key, value, words):
    recipe = load_recipe(write(MINIMAL + yaml.safe_dump({"training": {key: value}})))
    with pytest.raises(UserError, match=words):
        training_config(recipe)


def test_objectives_bring_their_defaults(write):
    paper = {"dft": (1.0, 0.85), "dft2": (0.3, 0.9), "sft": (None, None)}
    for name, wanted in paper.items():
        args = training_config(load_recipe(write(MINIMAL), [f"training.objective={name}"]))
        assert (args.tau, args.gamma) == wanted


def test_a_run_folder_that_is_not_there(tmp_path):
    """Near names are those beside it, and those of the recipes that come with lowdft."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=f"there is no such recipe or run folder. Did you mean '{tmp_path}/mine'"):
        load_recipe(tmp_path / "mne")
    with pytest.raises(UserError, match=r"nowhere/mine: there is no such recipe or run folder\.$"):
        load_recipe(tmp_path / "nowhere" / "mine")
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        load_recipe("quikstart")


def test_missing_file_missing_key_and_no_yaml(write, tmp_path):
    with pytest.raises(UserError, match="there is no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="data.train.*give it"):
        load_recipe(write("output_dir: out\nmodel: {name_or_path: a/b}\n"))
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(write("a: [1"))


def test_a_recipe_says_only_what_differs_from_the_one_it_extends(write, tmp_path):
    write(MINIMAL + "adapter: null\ntraining: {tau: 0.5, gamma: 0.9}\n")
    twin, cousin = tmp_path / "twin.yaml", tmp_path / "cousin.yaml"
    twin.write_text("extends: recipe.yaml\nadapter: {r: 4}\ntraining: {gamma: null}\n")
    cousin.write_text("extends: twin.yaml\nmodel: {revision: abc}\n")
    recipe = load_recipe(cousin, ["training.seed=1"])
    assert recipe.training == {"tau": 0.5, "gamma": None, "seed": 1} and recipe.adapter.r == 4
    assert (recipe.model.name_or_path, recipe.model.revision) == ("owner/name", "abc")
    twin.write_text("extends: cousin.yaml\n")
    with pytest.raises(UserError, match="and twin.yaml extend each other"):
        load_recipe(twin)
    twin.write_text("extends: absent.yaml\n")
    with pytest.raises(UserError, match="absent.yaml: there is no such recipe"):
        load_recipe(twin)


def test_resolved_recipe_reads_back(write, tmp_path):
    recipe = load_recipe(write(MINIMAL), ["training.tau=0.5", "negatives.seed=3"])
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    "override, words",
    [
        ("output_dir=[a]", "output_dir: Cannot convert"),
        ("training=[a]", "overrides training=.a.: one of them has another form than the recipe's key"),
        ("model=[a]", "overrides model=.a.: one of them has another form"),
        ("training.learning_rate={", "a value is not YAML .*put it in quotes"),
        ("training.learning_rate=${x}", "training.learning_rate: Interpolation key 'x' not found"),
        ("training.learning_rate=${oc.env:NOT_SET}", "training.learning_rate: .*NOT_SET"),
        ("training.objective=[sft]", "training.objective is .'sft'.; wanted str"),
        ("training.objective=null", "training.objective is None; wanted str"),
        ("training.objective_args=5", "training.objective_args is 5; wanted dict"),
        (
            "training.lr_scheduler_kwargs=5",
            "lr_scheduler_kwargs is 5; wanted (dict|str) or (dict|str) or null",
        ),
        ("training.save_steps=-5", "training.save_steps is -5; wanted a number of 0 or more"),
        ("training.num_train_epochs=.inf", "training.num_train_epochs is inf; wanted a number of 0 or more"),
    ],
)
def test_values_of_another_form_are_told_in_words(override, words, write, capsys, monkeypatch, tmp_path):
    """Through the command, which reads output_dir before it checks anything."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(write(MINIMAL)), override]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert main(["train", str(write(MINIMAL)), override]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_sections_without_keys_and_whole_numbers_written_with_a_point(write):
    """A section whose keys are all commented out is as if it was left out; 1e3 is a whole number."""
    recipe = load_recipe(
        write(MINIMAL + "negatives:\n  # top_k: 5\ntraining:\nevaluation:\n"), ["training.max_steps=1e3"]
    )
    assert (recipe.negatives.top_k, recipe.evaluation.answer) == (50, "auto")
    steps = training_config(recipe).max_steps
    assert (steps, type(steps)) == (1000, int)
    with pytest.raises(UserError, match="data.train.*give it"):
        load_recipe(write("output_dir: out\nmodel: {name_or_path: a/b}\ndata:\n"))
