"""Parameters kept in parts on several ranks: DeepSpeed's ZeRO and FSDP2, through accelerate.

They gather a layer's parameters when it runs, on all ranks at once, so every rank must run the same passes
(`Passes.in_step`). Both average gradients over ranks themselves, at every backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from lowdft.distributed import collectives
from lowdft.errors import UserError

DEEPSPEED_GLOBALS = {  # classes without code of their own on loading, which DeepSpeed puts into its checkpoints
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
LIBRARIES = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP"}


def is_sharded(accelerator: Accelerator) -> bool:
    """Does every rank keep a part of the training only?

    Raises:
        UserError: FSDP's first version, which is not supported; or FSDP on the CPU, where accelerate leaves it out.
    """
    if is_fsdp() and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP needs GPUs, a process each; found none. Use DeepSpeed (`--launch zero3`) or `--launch ddp`"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise UserError("fsdp_version is 1; wanted 2 in the launcher's configuration (`--launch fsdp` has it)")
    return accelerator.distributed_type in LIBRARIES


def is_fsdp() -> bool:
    """Was FSDP asked for?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """One of several backward passes of a micro-batch; DeepSpeed takes its optimizer step in the step's last one."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        ends_step = last and accelerator.sync_gradients
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=ends_step, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


def check_checkpoint(folder: Path, accelerator: Accelerator) -> None:
    """Refuses a checkpoint whose optimizer state this training cannot read.

    Whole copies and FSDP write that of one process, DeepSpeed a part a rank.

    Raises:
        UserError: it was written by another library.
    """
    now = LIBRARIES.get(accelerator.distributed_type)
    then = "DeepSpeed" if _parts(folder) else "FSDP" if list(folder.glob("pytorch_model_fsdp*")) else None
    if then != now:
        names = [name or "whole copies (one process or ddp)" for name in (then, now)]
        raise UserError(
            f"{folder}: was saved by a training with {names[0]}, this one is with {names[1]}, which cannot read its "
            "optimizer. Launch it as before, or train from the start in another output_dir."
        )


def check_pickles(folder: Path, trusted: bool) -> None:
    """Refuses a checkpoint that would run code when DeepSpeed, or torch's distributed checkpoint, unpickles it.

    All other files of a checkpoint are read with torch.load(weights_only=True), which runs none. `latest` and
    `latest_universal`, which name the folders of its parts, must not lead out of it.

    Raises:
        UserError: a file names something else than tensors and what DeepSpeed itself puts there.
    """
    if trusted:
        return
    found = [(Path(at) / name) for at, _, names in os.walk(folder, followlinks=True) for name in names]
    reasons = {path: _runs_code(path) for path in sorted(found) if path.suffix == ".pt" or path.name == ".metadata"}
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file() and not _is_inside(folder, (folder / name).read_text(errors="replace").strip()):
            reasons[folder / name] = "it leads out of the checkpoint"
    for path, reason in reasons.items():
        if reason:
            raise UserError(
                f"{path}: may run code when it is loaded ({reason}). If you know where this checkpoint comes from, add "
                "--trust-checkpoint (in Python: trainer.trust_checkpoint = True); else train from the start."
            )


def _is_inside(folder: Path, name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*", name, re.ASCII)) and (folder / name).is_dir()


def _runs_code(path: Path) -> str | None:
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - DEEPSPEED_GLOBALS
    except Exception:  # not torch's own format, whose contents can be listed without running them
        return "it is a plain pickle"
    return f"it names {', '.join(sorted(found))}" if found else None


def fit_checkpoint(folder: Path, accelerator: Accelerator) -> None:
    """Makes DeepSpeed read a checkpoint of another number of ranks: its optimizer's parts are put together first.

    They stay beside the parts, in DeepSpeed's own universal format, for as long as the checkpoint does.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or len(_parts(folder)) == accelerator.num_processes:
        return
    if accelerator.is_main_process and not (folder / "latest_universal").exists():  # the converter writes it last
        _put_together(_parts(folder)[0].parent)
    collectives.wait()
    accelerator.state.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}


def _parts(folder: Path) -> list[Path]:
    return list(folder.glob("global_step*/*_optim_states.pt"))


def _put_together(parts: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    whole = parts.with_name(parts.name + "_universal")
    shutil.rmtree(whole, ignore_errors=True)
    how = dict(num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True)
    folders = dict(input_folder=str(parts), output_folder=str(whole))
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(**folders, **how, inject_missing_state=True))
