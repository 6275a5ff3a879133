"""`DFTTrainer`: transformers' Trainer, whose steps and evaluations are those of a `StepEngine`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import AutoTokenizer

from lowdft import objectives
from lowdft.compat import LoopHooks
from lowdft.config.requirements import check_datasets
from lowdft.config.training import DFTConfig
from lowdft.data.batch import collate
from lowdft.data.encoded import EncodedRows
from lowdft.data.prepare import encode_rows
from lowdft.distributed import collectives, sharding
from lowdft.errors import UserError
from lowdft.logprobs import choose_layout
from lowdft.models.adapters import adapter_digest, make_policy
from lowdft.models.fused_lora import fused_lora
from lowdft.models.reference import attach_reference, check_reference
from lowdft.models.safeguards import guard_four_bit, switch_off_dropout
from lowdft.training.checkpoints import WholeCheckpoints, newest_whole, require_whole
from lowdft.training.engine import StepEngine
from lowdft.training.log_u import LogU, load_table, save_table, table_identity
from lowdft.training.metrics import Faded, StepMetrics
from lowdft.training.rows import encoder_for
from lowdft.training.support import check_arguments, check_model, check_peft, peft_config_of
from lowdft.training.token_budget import Passes

STATE_FILE = "log_u.safetensors"


class DFTTrainer(LoopHooks, WholeCheckpoints):
    """Trains a causal language model, or an adapter on it, with a discriminative objective.

    Args:
        model: a transformers model, a peft model, or the name of one.
        args: a `DFTConfig`.
        train_dataset, eval_dataset: rows of text (`prompt`, `completion`, `negatives`) or of ids (`prompt_ids`,
            `completion_ids`, `negative_ids`, optional `ref_negative_logps`); optional `example_id`.
        processing_class: the tokenizer; loaded with the model when it is given by name.
        peft_config: a peft configuration to put a fresh adapter on the model.

    `log_u` is the moving average of every training example (float32, in the dataset's order).

    Raises:
        UserError: rows that cannot be trained on (no completion token, too few negatives), or a reference that the
            model cannot give; before a model that is given by name is loaded.
    """

    def __init__(
        self,
        model,
        args: DFTConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        check_arguments(args, kwargs, eval_dataset is not None)
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        self.objective = objectives.get(args.objective)
        encoder = encoder_for(model, processing_class, args)
        train_rows = encode_rows(train_dataset, encoder)
        eval_rows = None if eval_dataset is None else encode_rows(eval_dataset, encoder)
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        for note in check_datasets(train_rows, eval_rows, self.objective, args, has_adapter):
            warnings.warn(note, stacklevel=2)
        if cut := encoder.cuts():
            warnings.warn(cut, stacklevel=2)
        needs_base = args.reference == "online" or self.objective.uses_mismatched
        check_peft(peft_config_of(model, peft_config), args, needs_base and self.objective.uses_any_reference)
        model = make_policy(model, args, peft_config)
        check_model(model, args)
        guard_four_bit(model)
        if (dropped := switch_off_dropout(model)) > 0:
            warnings.warn(f"the base's dropout of {dropped} is switched off; an adapter's stays", stacklevel=2)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            data_collator=collate,
            **kwargs,
        )
        self.sharded = sharding.is_sharded(self.accelerator)
        reference = adapter_digest(args.reference_adapter) if args.reference_adapter else "base"
        self._fingerprint, self._faded = table_identity(train_rows, args, reference), Faded()
        self.engine = self._make_engine(model)
        if not self.sharded:  # else no pass is possible before the parameters have their places
            self._choose_layout(self.model)

    def _make_engine(self, model: nn.Module) -> StepEngine:
        args, settings, weight = self.args, self.args.hyperparameters(), self.objective.token_weight
        passes = Passes(
            args.layout or "padded",
            args.logits_chunk_size,
            args.tokens_per_pass,
            knows_last=self.objective.linear,
            token_weight=weight and partial(weight, **settings),
            predicted_share=settings["predicted_share"] if self.objective.uses_predictions else 0.0,
            in_step=self.sharded,
            device=args.device,
        )
        return StepEngine(
            model,
            self.objective,
            settings,
            LogU(len(self.train_dataset), args.log_u_init),
            passes,
            args.negatives_per_step,
            args.reference_prompt,
            backward=lambda loss, last: sharding.backward(self.accelerator, loss, last),
            around=self._around_passes,
            spare=self.train_dataset[0],
        )

    @property
    def log_u(self) -> Tensor:
        """float32 [examples], the moving averages in the dataset's order."""
        return self.engine.log_u.values

    @property
    def layout(self) -> str:
        """How rows are laid out, "packed" or "padded"."""
        return self.engine.passes.layout

    def _choose_layout(self, model: nn.Module) -> None:
        self.engine.passes.layout = choose_layout(model, self.args.layout)
        if self.layout == "padded" and self.args.layout is None:
            warnings.warn(
                "this model's attention does not take packed rows: every completion becomes a row of its own, and "
                "the prompt is computed once for each",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _around_passes(self) -> Iterator[None]:
        """Only lowdft's own passes run in it: a callback finds the model as it was."""
        with contextlib.ExitStack() as stack:
            if self.model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16):
                stack.enter_context(disable_input_dtype_casting(self.model))  # autocast serves; no float32 copies
            if not self.sharded:  # sharded weights are gathered by hooks of the layers, which one function passes over
                stack.enter_context(fused_lora(self.model))
            if self.args.offload_checkpoints and torch.is_grad_enabled():
                stack.enter_context(save_on_cpu(pin_memory=self.args.device.type == "cuda"))
            yield

    # ---- what transformers' loop calls ------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Takes the micro-batches of one optimizer step and begins it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if collectives.world_size() > 1 and not self.args.dataloader_drop_last:
            again = collectives.repeated([inputs["batch"].index_M for inputs in samples], self.engine.log_u.visits)
            for inputs, skip in zip(samples, again, strict=True):
                inputs["batch"] = inputs["batch"].select([i for i, skipped in enumerate(skip) if not skipped])
        return samples, self.engine.begin([inputs["batch"] for inputs in samples], self.state.global_step + 1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch: accumulates its gradient, updates `log_u`, returns its share of the step's loss."""
        model.train()
        return self.engine.accumulate(inputs["batch"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's mean loss as evaluation sees it, without gradient (`StepEngine.evaluate`)."""
        self._drive(model)
        loss = self.engine.evaluate(inputs["batch"])
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation's loss."""
        return self.compute_loss(model, inputs), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """transformers' loop; adds the objective's metrics of this evaluation alone."""
        self.engine.evaluation = StepMetrics()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self.engine.evaluation.flush(self._logged_table())
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in found.items()})
        return output

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds the objective's metrics (`logps/*`, `weights/*`, `margin`, …) to transformers' log line."""
        if "loss" in logs:
            logs |= self.engine.metrics.flush(self._logged_table())
            self._faded.see(logs.get("weights/mean"))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate knows neither shared prompts nor frozen weights."""
        return 0

    def _logged_table(self) -> Tensor | None:
        return self.log_u if self.objective.uses_log_u else None

    # ---- beginning and resuming -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; with `resume_from_checkpoint`, goes on from there with the very numbers it would have had."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir}: there is no checkpoint to resume from")
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            require_whole(folder)
            sharding.check_pickles(folder, self.trust_checkpoint)
            sharding.check_checkpoint(folder, self.accelerator)
            sharding.fit_checkpoint(folder, self.accelerator)
            self.engine.load_state_dict(load_table(folder / STATE_FILE, self._fingerprint))
        if self.objective.uses_any_reference:
            resuming = bool(resume_from_checkpoint)
            check_reference(self.model, self._datasets(), self.objective, self.args, resuming)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def after_preparation(self, model: nn.Module, resuming: bool) -> None:
        """The initial weights, sharded or not, score what rows lack of the reference."""
        self._drive(model)
        if self.sharded:
            self._choose_layout(self.engine.policy)
        if self.objective.uses_any_reference:
            rows, self.engine.starts_as_reference = self._datasets(), self._starts_as_reference()
            with self._around_passes():
                attach_reference(self.engine.policy, rows, self.objective, self.args, self.engine.passes, resuming)

    def before_optimizer_step(self, gradient_norm: object) -> None:
        """Stops before a gradient that is not finite reaches the weights (with fp16 its scaler skips such steps)."""
        self.engine.check_gradient(float(gradient_norm), scaled=self.args.fp16)

    def _drive(self, model: nn.Module) -> None:
        """The engine's model: copies are driven without their wrapper, for their gradients are averaged once a step."""
        self.engine.model = model if self.sharded else self.accelerator.unwrap_model(model)

    def _datasets(self) -> list[EncodedRows]:
        return [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]

    def _starts_as_reference(self) -> bool:
        fresh = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        return (
            self.args.reference_prompt == "training" and bool(fresh) and not any(bool(p.detach().any()) for p in fresh)
        )

    def save_beside(self, folder: Path) -> None:
        """What an exact resume needs beside weights and optimizer: `log_u`, and how a step is split into passes."""
        save_table(folder / STATE_FILE, self.engine.state_dict(), self._fingerprint)
