"""Parameters that are sharded over several ranks: DeepSpeed's ZeRO and FSDP2, through accelerate.

They gather a layer's parameters on all ranks at once when it runs, so every rank must run the same passes
(`Passes.in_step`). Both average gradients over ranks in every backward pass.
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

DEEPSPEED_GLOBALS = {  # classes in DeepSpeed's checkpoints that run no code when loaded
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
LIBRARIES = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP"}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are sharded, so that every rank holds only a part.

    Raises:
        UserError: FSDP version 1, which is not supported; or FSDP on the CPU, where accelerate ignores it.
    """
    if is_fsdp() and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP needs one GPU per process; found none. Use DeepSpeed (`--launch zero3`) or `--launch ddp`"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise UserError("fsdp_version is 1; wanted 2 in the launcher's configuration (`--launch fsdp` has it)")
    return accelerator.distributed_type in LIBRARIES


def is_fsdp() -> bool:
    """Whether FSDP was requested."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """Runs one of several backward passes of a micro-batch; DeepSpeed updates the weights in the step's last one."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        ends_step = last and accelerator.sync_gradients
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=ends_step, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


def check_checkpoint(folder: Path, accelerator: Accelerator) -> None:
    """Raises UserError for a checkpoint whose optimizer state this run cannot read.

    Full copies and FSDP write the state of one process, DeepSpeed one part per rank.

    Raises:
        UserError: it was written with another library.
    """
    now = LIBRARIES.get(accelerator.distributed_type)
    then = "DeepSpeed" if _parts(folder) else "FSDP" if list(folder.glob("pytorch_model_fsdp*")) else None
    if then != now:
        names = [name or "full copies (one process or ddp)" for name in (then, now)]
        raise UserError(
            f"{folder} was saved by a run with {names[0]}, but this one is with {names[1]}, which cannot read its "
            "optimizer state. Launch it as before, or train from the start in another output_dir."
        )


def check_pickles(folder: Path, trusted: bool) -> None:
    """Raises UserError for a checkpoint that could run code when DeepSpeed or torch's distributed checkpoint loads it.

    All other files of a checkpoint are read with torch.load(weights_only=True), which runs none. `latest` and
    `latest_universal`, which name the folders of its parts, must not point outside it.

    Raises:
        UserError: a file names anything other than tensors and the classes that DeepSpeed itself saves.
    """
    if trusted:
        return
    found = [(Path(at) / name) for at, _, names in os.walk(folder, followlinks=True) for name in names]
    reasons = {path: _runs_code(path) for path in sorted(found) if path.suffix == ".pt" or path.name == ".metadata"}
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file() and not _is_inside(folder, (folder / name).read_text(errors="replace").strip()):
            reasons[folder / name] = "it points outside the checkpoint"
    for path, reason in reasons.items():
        if reason:
            raise UserError(
                f"{path}: may run code when it is loaded ({reason}). If you trust the source of this checkpoint, add "
                "--trust-checkpoint (in Python: trainer.trust_checkpoint = True); otherwise train from the start."
            )


def _is_inside(folder: Path, name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*", name, re.ASCII)) and (folder / name).is_dir()


def _runs_code(path: Path) -> str | None:
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - DEEPSPEED_GLOBALS
    except Exception:  # not torch's format, whose contents can be listed without running them
        return "it is a plain pickle"
    return f"it names {', '.join(sorted(found))}" if found else None


def fit_checkpoint(folder: Path, accelerator: Accelerator) -> None:
    """Lets DeepSpeed read a checkpoint written by a different number of ranks, by joining its optimizer's parts first.

    The joined state, in DeepSpeed's universal format, is kept in the checkpoint next to the parts.
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
