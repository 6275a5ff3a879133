"""DeepSpeed's ZeRO and FSDP2 on gloo give the numbers of one process, and save what plain libraries load."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from forked_ranks import run
from helpers import make_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowdft.distributed.sharding import check_checkpoint
from lowdft.errors import UserError

TRAINING = Path(__file__).with_name("training.py")
SETTINGS = {"adapter": {"reference": "online"}, "full": {"peft": False}}
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'lowdft[deepspeed]'"
)


def result(folder: Path, kind: str, processes: int, trained: str) -> dict:
    """A training of 14 examples in steps of 6, the last one uneven, in passes of 25 tokens at most."""
    folder.mkdir(exist_ok=True)
    settings = {"per_device_train_batch_size": 6 // processes, "num_train_epochs": 1, "tokens_per_pass": 25}
    run(TRAINING, processes, str(folder), kind, json.dumps(settings | SETTINGS[trained]), plain=kind == "one")
    return json.loads((folder / "result.json").read_text())


def logits(folder: Path, adapter: bool) -> torch.Tensor:
    """What the saved model says, loaded with transformers or peft alone."""
    saved = folder / "saved"
    model = PeftModel.from_pretrained(make_llama(), saved) if adapter else AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder and result of a training from its beginning, each made once."""
    done = {}

    def make(*what) -> tuple[Path, dict]:
        if what not in done:
            folder = tmp_path_factory.mktemp("training")
            done[what] = (folder, result(folder, *what))
        return done[what]

    return make


@pytest.mark.parametrize(
    "kind, processes, trained",
    [
        pytest.param("zero2", 2, "adapter", marks=deepspeed),
        pytest.param("zero3", 2, "adapter", marks=deepspeed),
        pytest.param("zero3", 3, "full", marks=deepspeed),
        ("fsdp", 2, "adapter"),
        ("fsdp", 3, "full"),
    ],
)
def test_sharded_is_one_process(kind, processes, trained, made):
    """Losses and log_u of one process, from passes that differ from rank to rank; what is saved says the same."""
    one, wanted = made("one", 1, trained)
    folder, found = made(kind, processes, trained)
    assert len(wanted["losses"]) == 3
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["log_u"] == pytest.approx(wanted["log_u"], rel=1e-4, abs=1e-5)
    assert found["model"].startswith("FSDP") == (kind == "fsdp")
    trained_logits, adapter = logits(one, trained == "adapter"), trained == "adapter"
    assert (logits(folder, adapter) - trained_logits).abs().max() < 1e-4
    assert (make_llama()(torch.arange(3, 40)[None]).logits - trained_logits).abs().max() > 1e-2


def test_fsdp_qlora(tmp_path):
    """A 4-bit base in parts: the losses and the adapter of one process, to bfloat16's rounding."""
    make_llama().save_pretrained(tmp_path / "base")
    folders = {"one": tmp_path / "one", "fsdp": tmp_path / "two"}
    SETTINGS["qlora"] = {"nf4": str(tmp_path / "base"), **SETTINGS["adapter"]}
    wanted, found = (result(folder, kind, 1 + (kind == "fsdp"), "qlora") for kind, folder in folders.items())
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
    assert found["model"].startswith("FSDP")
    one, two = (load_file(folder / "saved" / "adapter_model.safetensors") for folder in folders.values())
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], rtol=0.1, atol=5e-3)


@deepspeed
@pytest.mark.parametrize("objective", ["kto", "ift"])
def test_objectives_with_passes_of_their_own(objective, made):
    """KTO scores mismatched pairs, IFT what the model would have written: all ranks run these passes too."""
    SETTINGS[objective] = {**SETTINGS["adapter"], "objective": objective}
    (_, wanted), (_, found) = made("one", 1, objective), made("zero3", 2, objective)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


@pytest.mark.parametrize(
    "kind, saved_on, processes, trained",
    [
        pytest.param("zero3", 3, 3, "full", marks=deepspeed),
        pytest.param("zero3", 3, 1, "full", marks=deepspeed),
        pytest.param("zero3", 2, 3, "adapter", marks=deepspeed),
        pytest.param("zero2", 2, 3, "adapter", marks=deepspeed),
        ("fsdp", 3, 2, "full"),
    ],
)
def test_goes_on_from_a_checkpoint(kind, saved_on, processes, trained, made, tmp_path):
    """From step 2 of 3, as without an interruption, on any number of ranks."""
    folder, _ = made(kind, saved_on, trained)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    if trained == "full":
        shutil.copy(folder / "reference.safetensors", tmp_path)
    found, (_, wanted) = result(tmp_path, kind, processes, trained), made("one", 1, trained)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["log_u"] == pytest.approx(wanted["log_u"], rel=1e-4, abs=1e-5)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """Its optimizer cannot be read."""
    deepspeed_now = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    whole = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    check_checkpoint(tmp_path, whole)
    with pytest.raises(UserError, match="full copies .* this one is with DeepSpeed"):
        check_checkpoint(tmp_path, deepspeed_now)
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    check_checkpoint(tmp_path, deepspeed_now)
    with pytest.raises(UserError, match="with DeepSpeed, but this one is with full copies"):
        check_checkpoint(tmp_path, whole)
