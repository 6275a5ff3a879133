"""`DFTConfig`: transformers' training arguments, and those of the discriminative objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames, trainer_log_levels

from lowdft import objectives
from lowdft.text import did_you_mean

REFERENCES = ("precomputed", "online")
UNSUPPORTED = {  # fields of transformers that only its own training step uses, and the values that are allowed
    "label_smoothing_factor": (0.0,),
    "torch_compile": (False,),
    "torch_compile_backend": (None,),  # it, or the mode, turns torch_compile on
    "torch_compile_mode": (None,),
    "use_liger_kernel": (False,),
    "neftune_noise_alpha": (0.0,),
    "bf16_full_eval": (False,),  # would convert the trained weights themselves to half precision
    "fp16_full_eval": (False,),
    "train_sampling_strategy": ("random", "sequential"),
    "auto_find_batch_size": (False,),  # tokens_per_pass shrinks by itself
    "include_for_metrics": ([],),
    "batch_eval_metrics": (False,),
    "parallelism_config": (None,),
    "include_num_input_tokens_seen": (False, "no"),  # would count ids of batches, which have none
    "resume_from_checkpoint": (None,),  # transformers' scripts read it, its trainer does not
}
COUNTS = (  # whole numbers of 1 or more
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "negatives_per_step",
    "tokens_per_pass",
)
NAMES = {  # the allowed values of fields of transformers
    "eval_strategy": [strategy.value for strategy in IntervalStrategy],
    "logging_strategy": [strategy.value for strategy in IntervalStrategy],
    "save_strategy": [strategy.value for strategy in SaveStrategy],
    "lr_scheduler_type": [schedule.value for schedule in SchedulerType],
    "optim": [optimizer.value for optimizer in OptimizerNames],
    "log_level": list(trainer_log_levels),
    "log_level_replica": list(trainer_log_levels),
}
AMOUNTS = (
    "learning_rate",
    "weight_decay",
    "num_train_epochs",
    "save_steps",
    "logging_steps",
    "warmup_steps",
    "eval_delay",
)
LARGEST = 1e4  # of log_u_init, in nats
REFERENCE_PROMPTS = ("training", "sampling", "proposal")


@dataclass
class DFTConfig(TrainingArguments):
    """All settings of training. It has every field of `transformers.TrainingArguments`, and those listed here.

    Args:
        objective: one of `lowdft.objectives.names()`.
        tau: temperature of the discriminative likelihood; None means the objective's default.
        gamma: step size of the moving average in (0, 1]; None means the objective's default.
        log_u_init: initial log_u of every example: a number (0 in the paper) or "first_batch".
        negatives_per_step: B, how many negatives of a prompt are used each time it is trained on; the next time uses
            the next B.
        objective_args: the objective's other hyper-parameters (besides tau and gamma), by name.
        reference: "precomputed" (the dataset's `ref_negative_logps`, or scores of the initial weights computed before
            the first step) or "online" (scores of the base with the adapter switched off, computed in every step).
        reference_model: the reference model: "base", or "adapter:PATH", the base with that trained adapter. In the
            second case training starts from a copy of that adapter (SFT, then preference optimization).
        reference_prompt: the prompt under which the reference scores negatives: "training" (as in the authors' code),
            "sampling" (as in the paper's Eq. 7), or "proposal", the density of the sampler with temperature, top-k and
            top-p.
        max_length: maximum tokens of prompt + completion; longer completions lose their end. None: no limit.
        max_prompt_length: maximum tokens of a prompt; longer prompts lose their beginning. None: no limit.
        layout: "packed" or "padded" rows; None decides with a small forward pass (`lowdft.logprobs.choose_layout`).
        tokens_per_pass: maximum tokens of one forward pass. A micro-batch (per_device_train_batch_size prompts) takes
            as many passes as it needs; if the completions of one prompt do not fit, they are scored and backpropagated
            in pieces. This affects memory, not results.
        logits_chunk_size: how many tokens have their logits in memory at the same time. None: as many as fit into
            100 MB (320 MB on a GPU), a power of two, at most 1024.
        offload_checkpoints: keep the activations that gradient checkpointing saves in CPU memory instead of GPU
            memory; slower, with the same results.
        freeze_half: train a random half of the adapted modules, balanced over their types and chosen by `seed` ("Half
            Fine-Tuning"; its form for LoRA was derived here). With `rounds`, each round trains another half.
    """

    objective: str = "dft"
    tau: float | None = None
    gamma: float | None = None
    log_u_init: float | str = 0.0
    negatives_per_step: int = 2
    objective_args: dict = field(default_factory=dict)
    reference: str = "precomputed"
    reference_model: str = "base"
    reference_prompt: str = "training"
    max_length: int | None = 1024
    max_prompt_length: int | None = 512
    layout: str | None = None
    tokens_per_pass: int = 8192
    logits_chunk_size: int | None = None
    offload_checkpoints: bool = False
    freeze_half: bool = False

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    per_device_train_batch_size: int = 8
    logging_steps: float = 1
    logging_first_step: bool = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        chosen = objectives.get(self.objective)
        if self.tau is None:
            self.tau = chosen.defaults.get("tau")
        if self.gamma is None:
            self.gamma = chosen.defaults.get("gamma")
        if isinstance(self.log_u_init, str) and self.log_u_init != "first_batch":
            self.log_u_init = _number("log_u_init", self.log_u_init)
        _require(self.tau is None or 0 < self.tau < math.inf, "tau", self.tau, "a number above 0")
        _require(self.gamma is None or 0 < self.gamma <= 1, "gamma", self.gamma, "a number in (0, 1]")
        self._check_numbers()
        self._check_names()
        _require(self.reference in REFERENCES, "reference", self.reference, " or ".join(REFERENCES))
        kind, _, path = self.reference_model.partition(":")
        known = self.reference_model == "base" or (kind == "adapter" and path)
        _require(known, "reference_model", self.reference_model, "base or adapter:PATH")
        _require(
            self.reference_prompt in REFERENCE_PROMPTS,
            "reference_prompt",
            self.reference_prompt,
            ", ".join(REFERENCE_PROMPTS),
        )
        _require(self.layout in (None, "packed", "padded"), "layout", self.layout, "packed or padded")
        unknown = set(self.objective_args) - (set(chosen.defaults) - {"tau", "gamma"})
        wanted = f"hyper-parameters of {self.objective} (tau and gamma are training.tau and training.gamma)"
        _require(not unknown, "objective_args", sorted(unknown), wanted)
        chosen.try_out(self.hyperparameters())
        if chosen.uses_any_reference and self.reference == "online":
            wanted = "training or sampling with reference: online (proposal is scored before training)"
            _require(self.reference_prompt != "proposal", "reference_prompt", self.reference_prompt, wanted)
        if chosen.uses_completion_reference:
            _require(
                self.reference_prompt == "training",
                "reference_prompt",
                self.reference_prompt,
                f"training for {chosen.name}",
            )
        if chosen.uses_mismatched:
            batch = self.per_device_train_batch_size
            _require(batch > 1, "per_device_train_batch_size", batch, f"2 or more for {chosen.name}")
        for name, supported in UNSUPPORTED.items():
            found = getattr(self, name)
            wanted = f"{supported[0]}: lowdft does not support it; docs/from-trl.md says why, and what to use instead"
            _require(found is None or found in supported, name, found, wanted)
        _require(
            self.gradient_checkpointing or not self.offload_checkpoints,
            "offload_checkpoints",
            self.offload_checkpoints,
            "false, or true together with gradient_checkpointing: true",
        )
        if self.gradient_checkpointing and not isinstance(self.gradient_checkpointing_kwargs, str):
            self.gradient_checkpointing_kwargs = {"use_reentrant": False} | (self.gradient_checkpointing_kwargs or {})
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name in COUNTS:
            _require(_is_count(getattr(self, name)), name, getattr(self, name), "a whole number of 1 or more")
        for name in ("max_length", "max_prompt_length", "logits_chunk_size"):
            found = getattr(self, name)
            _require(found is None or _is_count(found), name, found, "a whole number of 1 or more, or null")
        steps, wanted = self.max_steps, "a whole number of 1 or more, or -1 for all epochs"
        _require(type(steps) is int and steps != 0, "max_steps", steps, wanted)
        _require(_is_amount(self.max_grad_norm), "max_grad_norm", self.max_grad_norm, "a number; 0 for no clipping")
        for name in AMOUNTS:
            _require(_is_amount(getattr(self, name)), name, getattr(self, name), "a number of 0 or more")
        between = self.eval_steps
        _require(between is None or _is_amount(between), "eval_steps", between, "a number above 0, or null")
        start, wanted = self.log_u_init, f"a number from {-LARGEST:g} to {LARGEST:g} or first_batch"
        _require(isinstance(start, str) or abs(start) <= LARGEST, "log_u_init", start, wanted)
        some = self.max_steps > 0 or self.num_train_epochs > 0
        _require(some, "num_train_epochs", self.num_train_epochs, "more than 0, or max_steps above 0")
        workers = self.dataloader_num_workers
        _require(workers == 0 or _is_count(workers), "dataloader_num_workers", workers, "a whole number of 0 or more")
        for name in ("seed", "data_seed"):
            seed = getattr(self, name)
            _require(seed is None or 0 <= seed < 2**32, name, seed, "a whole number from 0 to 4294967295")

    def _check_names(self) -> None:
        for name, known in NAMES.items():
            found = getattr(self.__dict__[name], "value", self.__dict__[name])
            if found is False and "no" in known:  # YAML reads a bare no as false
                found = "no"
                setattr(self, name, found)
            if found not in known:
                raise ValueError(f"training.{name} is {found!r}.{did_you_mean(str(found), known)}")
        evaluations, checkpoints = self.eval_strategy, self.save_strategy
        if self.load_best_model_at_end and checkpoints not in (evaluations, "best"):
            raise ValueError(
                f"training.load_best_model_at_end needs an evaluation for every checkpoint, but eval_strategy is "
                f"{getattr(evaluations, 'value', evaluations)} and save_strategy is "
                f"{getattr(checkpoints, 'value', checkpoints)}; set both to steps or both to epoch"
            )

    @property
    def reference_adapter(self) -> str | None:
        """The path in `reference_model: adapter:PATH`."""
        return None if self.reference_model == "base" else self.reference_model.removeprefix("adapter:")

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step, over all micro-batches and processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def hyperparameters(self) -> dict:
        """The objective's keyword arguments: its defaults, overridden by `objective_args` and by tau and gamma."""
        values = {**objectives.get(self.objective).defaults, **self.objective_args}
        own = {"tau": self.tau, "gamma": self.gamma}
        return {name: own.get(name, value) for name, value in values.items()}


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"training.{key} is {text!r}; wanted a number or first_batch") from None


def _require(holds: bool, key: str, found: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"training.{key} is {found!r}; wanted {wanted}")
