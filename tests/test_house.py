"""The house: arrows point down only, every module imports, every recipe parses, help is instant."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lowdft.config.recipe import load_recipe, training_config
from lowdft.study import as_overrides, combinations, read_study

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in ROOT.glob("lowdft/**/*.py")
)
# floor of each room; a module may import its own floor and below, a stage no other stage
FLOORS = {
    "lowdft.__main__": 5,
    "lowdft.cli": 4,
    "lowdft.study": 4,
    "lowdft.verbs": 4,
    "lowdft.start": 3,
    "lowdft.pipeline.stages": 3,
    "lowdft.pipeline": 2,
    "lowdft.evaluation": 2,
    "lowdft.reporting.metrics": 0,
    "lowdft.reporting": 2,
    "lowdft.training.log_u": 0,
    "lowdft.training.preemption": 0,
    "lowdft.training": 1,
    "lowdft.models": 1,
    "lowdft.sampling": 1,
    "lowdft.data": 1,
    "lowdft.config": 1,
    "lowdft.distributed": 1,
    "lowdft.objectives": 0,
    "lowdft.logprobs": 0,
    "lowdft.errors": 0,
    "lowdft.files": 0,
    "lowdft.text": 0,
    "lowdft": 1,
}
PURE = ("lowdft.objectives", "lowdft.logprobs")  # import torch alone; and one registers with transformers
REGISTERS = "lowdft.logprobs.attention"
OPTIONAL = {
    "vllm": "lowdft.sampling.vllm",
    "math_verify": "lowdft.evaluation.answers",
    "lm_eval": "lowdft.evaluation.benchmarks",
}  # each imported in one place


def floor(module: str) -> int:
    return next(level for room, level in FLOORS.items() if module == room or module.startswith(room + "."))


def imports(module: str) -> set[str]:
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in MODULES}
    return found - {"lowdft"}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    for name in imports(module):
        if name in MODULES:
            assert floor(name) <= floor(module), f"{module} (floor {floor(module)}) imports {name}"
            stages = name.startswith("lowdft.pipeline.stages.") and module.startswith("lowdft.pipeline.stages.")
            assert not stages, f"the stage {module} imports the stage {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(PURE)])
def test_objectives_and_engine_import_torch_alone(module):
    outside = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {"torch", "lowdft"}
    assert outside == ({"transformers"} if module == REGISTERS else set())
    assert all(name.startswith((*PURE, "lowdft.errors")) for name in imports(module) if name.startswith("lowdft"))


@pytest.mark.parametrize("extra, home", OPTIONAL.items())
def test_optional_packages_have_one_home(extra, home):
    assert [m for m in MODULES if any(name.split(".")[0] == extra for name in imports(m))] == [home]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "lowdft.__main__"])
def test_every_module_imports(module):
    assert importlib.import_module(module).__name__ == module


@pytest.mark.parametrize("module", MODULES)
def test_unix_only_modules_are_imported_where_they_are_used(module):
    """Windows has none of them, and imports every module all the same."""
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    at_the_top = ast.parse(path.read_text()).body
    names = {a.name for node in at_the_top if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in at_the_top if isinstance(node, ast.ImportFrom)}
    assert not names & {"fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty"}


STUDIES = sorted(ROOT.glob("recipes/studies/*.yaml"))


@pytest.mark.parametrize("path", sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(STUDIES)), ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    recipe = load_recipe(path)
    assert training_config(recipe).objective in ("dft", "dft2", "sft", "listwise", "dpo", "simpo")


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_parses(path):
    """With every combination of its grid, on its recipe."""
    study = read_study(path)
    for _, settings in combinations(study):
        recipe = load_recipe(study["recipe"], as_overrides(settings))
        args = training_config(recipe)
        for key, value in settings.items():
            section, name = key.split(".", 1)
            if "." not in name:
                assert getattr(args if section == "training" else getattr(recipe, section), name) == value


def test_help_imports_no_torch():
    """What makes `--help` instant."""
    out = subprocess.run([sys.executable, "-m", "lowdft", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and "run every stage" in out.stdout
    code = "import sys, lowdft.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


def test_shells_complete_the_verbs(tmp_path):
    """shtab reads the parser: `shtab --shell=bash lowdft.verbs.make_parser`."""
    shtab = pytest.importorskip("shtab")
    from lowdft.verbs import VERBS, make_parser

    script = shtab.complete(make_parser(), "bash")
    assert f"subparsers=({' '.join(VERBS)})" in script and "--into" in script
