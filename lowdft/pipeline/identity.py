"""The identity of every artifact: what its numbers depend on, from the resolved recipe and from contents.

An identity is a flat dictionary of plain values, with one function per artifact. It identifies weights, adapters and
data by content, and has settings with defaults filled in, so that spelling out a default, moving a folder or renaming a
file makes no difference. Settings that only affect memory, speed, logging or the number of processes are left out: they
may change when a run resumes. The batch size is given as prompts per optimizer step, however it is split over devices
and micro-batches. `attn_implementation` of a base is included: in bfloat16 another one changes sums by nats, and policy
and reference must use the same.

Versions of packages are recorded under `version.NAME`. A different version changes numbers by rounding, so `Product`
only warns: an error would throw away hours of work at every upgrade.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path

from lowdft import models
from lowdft.config.sections import AdapterSection
from lowdft.config.training import DFTConfig
from lowdft.models.adapters import adapter_digest, adapter_identity
from lowdft.models.reference import REFERENCE_NEEDS
from lowdft.training.log_u import TRAINED_WITH

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
NOT_OF_SAMPLES = (  # settings of negatives that do not affect a sample
    "source",
    "push",
    "private",
    "per_prompt",
    "eval_per_prompt",
    "batch_size",
    "gpu_memory_utilization",
    "adapter",
)
TRAINING = (*TRAINED_WITH, "num_train_epochs", "max_steps")
# settings that do not change numbers of training: by name, and by prefix
INCIDENTAL = {
    "output_dir",
    "objective",  # these six are included in another form
    "tau",
    "gamma",
    "objective_args",
    "reference_model",
    "reference_prompt",
    "max_length",
    "max_prompt_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "tokens_per_pass",
    "layout",
    "logits_chunk_size",
    "offload_checkpoints",
    "auto_find_batch_size",
    "average_tokens_across_devices",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "full_determinism",
    "ignore_data_skip",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "label_names",
    "local_rank",
    "parallelism_config",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "remove_unused_columns",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "use_cache",
    "use_cpu",
}
INCIDENTAL_PREFIXES = (
    "activation_checkpointing",
    "batch_eval",
    "dataloader_",
    "ddp_",
    "do_",
    "enable_jit",
    "eval_",
    "fsdp",
    "gradient_checkpointing",
    "hub_",
    "log_",
    "logging_",
    "restore_",
    "save_",
    "torch_compile",
    "torch_empty_cache",
    "trackio_",
)


def negatives(run, split: str) -> dict:
    """The identity of the negatives that the base (or base + `negatives.adapter`) writes for the rows of a split."""
    section = dataclasses.asdict(run.recipe.negatives)
    how = {f"negatives.{k}": v for k, v in section.items() if k not in NOT_OF_SAMPLES}
    if section["strategy"] == "few_shot":  # the choice of shots depends on all training rows
        how["negatives.shots_from"] = run.splits.digests["train"]
    else:
        del how["negatives.shots"]
    if section["keep"] == "wrong":
        how |= {f"evaluation.{name}": getattr(run.recipe.evaluation, name) for name in ("answer", "pattern")}
    trained = section["adapter"] if split == "train" else None  # held-out negatives always come from the base
    how["negatives.adapter"] = trained and adapter_digest(trained, "negatives.adapter")
    how["negatives.per_prompt"] = run.negatives_wanted(split)
    lengths = {"max_prompt_length": run.encoder.prompt_limit, "end_ids": run.encoder.end_ids}
    return _base(run) | _data(run, split) | lengths | how


def rows(run, split: str, with_negatives: bool = True) -> dict:
    """The identity of a split's encoded rows."""
    generated = with_negatives and not run.ready_negatives(split) and run.negatives_wanted(split)
    made = negatives(run, split) if generated else _base(run) | _data(run, split)
    made |= {"max_length": run.encoder.max_length, "max_prompt_length": run.encoder.prompt_limit}
    made["end_ids"] = run.encoder.end_ids
    return made | {"ready_negatives": run.ready_negatives(split)}


def encoding(run, split: str, with_negatives: bool) -> dict:
    """The identity of the file with a split's encoded rows, which also has the sampling prompts if they are used."""
    section = run.recipe.negatives
    prompts = {name: getattr(section, name) for name in ("strategy", "system_prompt", "template", "shots", "seed")}
    sampled = run.args.reference_prompt != "training"
    return rows(run, split, with_negatives) | {"sampling_prompts": prompts if sampled else None}


def reference(run) -> dict:
    """The identity of the reference's log-probabilities of the training rows."""
    return rows(run, "train") | _reference(run)


def training(run) -> dict:
    """The identity of the trained adapter (or the whole model)."""
    args = run.args
    settings = {"objective": args.objective, **args.hyperparameters()}
    settings |= {name: getattr(args, name) for name in TRAINING}
    defaults = {field.name: field.default for field in dataclasses.fields(DFTConfig)}
    for name, value in run.recipe.training.items():  # of all other settings, only those that this recipe sets
        if not (name in INCIDENTAL or name.startswith(INCIDENTAL_PREFIXES) or value == defaults[name]):
            settings[name] = value
    made = rows(run, "train") | (_reference(run) if run.objective.uses_any_reference else {})
    made |= {"reference_model": _reference_model(run)}  # training starts from it, even if the loss has no reference
    return made | {f"training.{k}": _plain(v) for k, v in settings.items()} | _adapter(run.recipe.adapter)


def base_evaluation(run) -> dict:
    """The identity of the base's evaluation, which is the same for all runs with the same held-out rows."""
    section = run.recipe.evaluation
    how = {f"evaluation.{name}": getattr(section, name) for name in ("answer", "pattern", "max_new_tokens")}
    return rows(run, "heldout") | how


def evaluation(run) -> dict:
    """The identity of the evaluation of the base, the trained model and the compared ones."""
    made = base_evaluation(run)
    for name, path in run.recipe.evaluation.compare.items():
        made[f"evaluation.compare.{name}"] = adapter_digest(adapter_folder(path), f"evaluation.compare.{name}")
    trained = {k: v for k, v in training(run).items() if not k.startswith("version.")}
    return made | {f"trained.{k}": v for k, v in trained.items()}


def adapter_folder(path: str | Path) -> Path:
    """The adapter of a run folder, or the adapter itself."""
    return Path(path) / "adapter" if (Path(path) / "adapter").is_dir() else Path(path)


def _base(run) -> dict:
    names = [n for n in PACKAGES if n != "bitsandbytes" or run.recipe.model.load_in_4bit]
    versions = {f"version.{name}": _version(name) for name in names}
    return models.made_from(run.source, run.recipe.model, run.tokenizer) | versions


@functools.cache
def _version(package: str) -> str:
    """A package's version, cached: reading its metadata takes 15 ms, and every check of a product needs it."""
    return importlib.metadata.version(package)


def _data(run, split: str) -> dict:
    return {"data": run.splits.digests[split]}


def _reference(run) -> dict:
    found = {
        "reference_prompt": run.args.reference_prompt,
        "reference_of": sorted(run.objective.needs & REFERENCE_NEEDS),
        "reference_model": _reference_model(run),
    }
    if run.args.reference_prompt != "training":
        section = run.recipe.negatives
        names = ("strategy", "system_prompt", "template", "temperature", "top_p", "top_k")
        if section.strategy == "few_shot":
            names += ("shots", "seed")
            found["negatives.shots_from"] = run.splits.digests["train"]
        found |= {f"negatives.{name}": getattr(section, name) for name in names}
    return found


def _reference_model(run) -> str:
    path = run.args.reference_adapter
    return "base" if path is None else adapter_digest(path)


def _adapter(section: AdapterSection | None) -> dict:
    if section is None:
        return {"adapter": None}
    return {f"adapter.{k}": _plain(v) for k, v in adapter_identity(section).items()}


def _plain(value: object) -> object:
    """The value as it would be read from a manifest: enumerations by value, sequences as lists."""
    return json.loads(json.dumps(getattr(value, "value", value), default=str))
