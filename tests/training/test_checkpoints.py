"""A damaged checkpoint is named, and the whole one before it is used; nothing in one is run."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil

import pytest
import torch
from helpers import losses, make_trainer
from transformers import TrainerCallback

from lowdft.distributed.sharding import DEEPSPEED_GLOBALS, check_pickles
from lowdft.errors import UserError
from lowdft.training import checkpoints
from lowdft.training.checkpoints import damage_of, newest_whole, require_whole

SETTINGS = dict(save_strategy="steps", save_steps=2, save_total_limit=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of six steps with checkpoints after 2, 4 and 6, and its losses."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, **SETTINGS)
    trainer.train()
    return folder, losses(trainer), trainer.log_u


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def change(path, how: str) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
        return
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    path.write_bytes({"emptied": b"", "cut": content[:middle], "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "flipped"])
def test_damage_of_every_file_is_found_and_the_one_before_is_used(how, folder, recwarn):
    """The damaged one is named in a warning and set aside."""
    names = [p.relative_to(folder / "checkpoint-6") for p in (folder / "checkpoint-6").rglob("*") if p.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "log_u.safetensors", "manifest.json"} <= set(
        map(str, names)
    )
    for name in names:
        shutil.copytree(folder / "checkpoint-6", folder / "kept")
        assert damage_of(folder / "checkpoint-6") is None
        change(folder / "checkpoint-6" / name, how)
        assert newest_whole(folder) == str(folder / "checkpoint-4"), name
        assert str(name) in str(recwarn.pop(UserWarning).message)
        assert (folder / "checkpoint-6.damaged").is_dir() and not (folder / "checkpoint-6").exists()
        os.replace(folder / "kept", folder / "checkpoint-6")


def test_resume_from_the_one_before_has_the_same_end(folder, trained):
    """The losses and moving averages of the training without damage; the damaged one is replaced by a whole one."""
    change(folder / "checkpoint-6" / "optimizer.pt", "flipped")
    resumed = make_trainer(folder, **SETTINGS)
    with pytest.warns(UserWarning, match="optimizer.pt has other contents.*checkpoint-4 is intact and is used"):
        resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == trained[1] and torch.equal(resumed.log_u, trained[2])
    assert damage_of(folder / "checkpoint-6") is None and not (folder / "checkpoint-6.damaged").exists()


def test_a_resume_after_the_last_step_tidies_up(trained, tmp_path):
    """What a kill left behind right after the last checkpoint got its name: one too many, and half of a next one."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / ".partial" / "old").mkdir(parents=True)
    make_trainer(folder, **(SETTINGS | {"save_total_limit": 2})).train(resume_from_checkpoint=True)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"checkpoint-4", "checkpoint-6"}


def test_two_trainers_do_not_write_one_folder(tmp_path):
    """The second one is refused while the first one trains, and may train afterwards."""
    first = make_trainer(tmp_path, max_steps=2, save_steps=1)
    second = make_trainer(tmp_path, max_steps=1)
    refused = []

    class Starts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(UserError, match="another lowdft is writing this folder") as error:
                second.train()
            refused.append(str(error.value))

    first.add_callback(Starts())
    first.train()
    assert len(refused) == 2 and second.state.global_step == 0
    second.train()
    assert second.state.global_step == 1


def test_without_a_whole_one_it_is_an_error(folder):
    for number in (2, 4, 6):
        change(folder / f"checkpoint-{number}" / "scheduler.pt", "deleted")
    with pytest.raises(UserError, match="checkpoint-6/scheduler.pt is missing.*No intact checkpoint is left"):
        newest_whole(folder)
    with pytest.raises(UserError, match="scheduler.pt is missing"):
        make_trainer(folder, **SETTINGS).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert newest_whole(folder / "nothing") is None


def test_one_without_an_optimizer_is_refused(tmp_path):
    """transformers resumes from it with a fresh optimizer, silently."""
    make_trainer(tmp_path, max_steps=1, save_only_model=True, **SETTINGS | dict(save_steps=1)).train()
    with pytest.raises(UserError, match="no optimizer state"):
        require_whole(tmp_path / "checkpoint-1")


def test_size_does_not_grow_with_the_log(tmp_path, monkeypatch):
    """The last lines are kept, to mend metrics.jsonl by; the trainer keeps all."""
    monkeypatch.setattr(checkpoints, "LINES_KEPT", 2)
    trainer = make_trainer(tmp_path, logging_steps=1, **SETTINGS)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"]] == [5, 6] and len(losses(trainer)) == 6
    assert not (tmp_path / "checkpoint-6" / "training_args.bin").exists()


class Run:
    """What a pickle can run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/lowdft-ran",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_that_run_code_are_refused(save, tmp_path):
    """In DeepSpeed's parts and their universal form; what it writes itself passes, and so does what is trusted."""
    parts = tmp_path / "global_step2" / "zero"
    parts.mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, parts / "0_optim_states.pt")
    check_pickles(tmp_path, trusted=False)
    save({"a": Run()}, parts / "1_optim_states.pt")
    with pytest.raises(UserError, match="1_optim_states.pt: may run code.*--trust-checkpoint"):
        check_pickles(tmp_path, trusted=False)
    check_pickles(tmp_path, trusted=True)


@pytest.mark.parametrize("place", ["mp_rank_00_model_states.pt", "global_step2/linked/a.pt"])
def test_pickles_in_every_place_are_looked_at(place, tmp_path):
    """Beside the parts, where `latest` could send DeepSpeed, and behind a link."""
    checkpoint, elsewhere = tmp_path / "checkpoint-2", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (checkpoint / "global_step2").mkdir(parents=True)
    (checkpoint / "global_step2" / "linked").symlink_to(elsewhere)
    torch.save({"a": Run()}, checkpoint / place)
    with pytest.raises(UserError, match=f"{place}: may run code.*posix.system"):
        check_pickles(checkpoint, trusted=False)


@pytest.mark.parametrize("name", ["../other", "/tmp", ".", "", "global_step3"])
def test_names_of_parts_stay_inside(name, tmp_path):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "latest").write_text("global_step2\n")
    check_pickles(tmp_path, trusted=False)
    (tmp_path / "latest_universal").write_text(name)
    with pytest.raises(UserError, match="latest_universal: may run code.*points outside the checkpoint"):
        check_pickles(tmp_path, trusted=False)


class Calls:
    """A pickle that calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, torch.load, torch.hub.load, pickle.loads, open])
def test_functions_are_refused_by_name(function, tmp_path):
    (tmp_path / "global_step2").mkdir()
    torch.save({"a": Calls(function, "touch")}, tmp_path / "global_step2" / "a.pt")
    with pytest.raises(UserError, match=f"it names .*{function.__name__}"):
        check_pickles(tmp_path, trusted=False)


def test_classes_of_deepspeed_that_pass_do_nothing_when_loaded():
    """Without a `__setstate__` or `__reduce__` of their own, and nothing of them opens, imports or evaluates."""
    pytest.importorskip("deepspeed")
    for name in DEEPSPEED_GLOBALS:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, type) and "__setstate__" not in vars(found)
        used = set(found.__init__.__code__.co_names) if hasattr(found.__init__, "__code__") else set()
        assert not used & {"open", "eval", "exec", "__import__", "import_module", "system", "Popen", "load"}
