"""`DFTTrainer`: transformers' Trainer with the steps and evaluations of a `StepEngine`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import AutoTokenizer

from lowdft import objectives
from lowdft.compat import LoopHooks
from lowdft.config.training import DFTConfig
from lowdft.data.batch import collate
from lowdft.data.encode import Truncation
from lowdft.data.encoded import EncodedRows
from lowdft.distributed import sharding
from lowdft.errors import UserError
from lowdft.logprobs import layers_in
from lowdft.models.adapters import adapter_digest, by_name, identity_of, trained_beside, without_input_casts
from lowdft.models.base import base_digest
from lowdft.models.fused_lora import fused_lora
from lowdft.models.reference import attach_reference, check_reference
from lowdft.training.checkpoints import WholeCheckpoints, newest_whole, require_whole
from lowdft.training.datasets import as_list, check_evaluation, check_ids, encoded, read_datasets, train_loader
from lowdft.training.engine import StepEngine
from lowdft.training.log_u import LogU, load_table, save_table, table_identity
from lowdft.training.metrics import Faded, StepMetrics
from lowdft.training.rows import encoder_for
from lowdft.training.setup import (
    choose_precision,
    layout_of,
    make_passes,
    ready_model,
    starts_as_reference,
    starts_from_base,
)
from lowdft.training.support import check_arguments, check_peft, peft_config_of

STATE_FILE = "log_u.safetensors"


class DFTTrainer(LoopHooks, WholeCheckpoints):
    """Trains a causal language model, or an adapter on it, with a discriminative objective.

    Args:
        model: a transformers model, a peft model, or the name of a model.
        args: a `DFTConfig`.
        train_dataset, eval_dataset: rows of text (`prompt`, `completion`, `negatives`) or of ids (`prompt_ids`,
            `completion_ids`, `negative_ids`, optional `ref_negative_logps`); optional `example_id`.
        processing_class: the tokenizer; if the model is given by name, its tokenizer is loaded by default.
        peft_config: a peft configuration for a new adapter on the model.

    `log_u` is the logarithm of every training example's moving average (float32, in the order of the data set).

    Raises:
        UserError: rows cannot be trained on (no completion token, too few negatives), or the model cannot provide the
            reference. If the model is given by name, this is checked before it is loaded.
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
        own_loss = {"compute_loss": type(self).compute_loss is not DFTTrainer.compute_loss or None}
        check_arguments(args, {"model": model, **kwargs, **own_loss}, eval_dataset)
        if isinstance(model, str):
            processing_class = processing_class or by_name(AutoTokenizer, model)
        self.objective = objectives.get(args.objective)
        encoder = encoder_for(model, processing_class, args)
        self._encoder, self._encode = encoder, partial(encoded, encoder=encoder, objective=self.objective)
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        about = (encoder, self.objective, args, has_adapter)
        train_rows, eval_sets = read_datasets(train_dataset, eval_dataset, *about)
        needs_base = args.reference == "online" and self.objective.uses_any_reference
        check_peft(peft_config_of(model, peft_config), args, needs_base)
        model = ready_model(model, args, peft_config)
        check_ids([train_rows, *as_list(eval_sets)], model)
        self._starts_from_base = starts_from_base(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_sets,
            processing_class=processing_class,
            data_collator=collate,
            **kwargs,
        )
        self.sharded = sharding.is_sharded(self.accelerator)
        self._layers_in = choose_precision(model, args, self.sharded)
        reference = adapter_digest(args.reference_adapter) if args.reference_adapter else "base"
        self._faded, identities = Faded(), (identity_of(model), base_digest(model))
        self._fingerprint = table_identity(train_rows, args, reference, *identities)
        self.engine = StepEngine(
            model,
            self.objective,
            args.hyperparameters(),
            LogU(len(train_rows), args.log_u_init),
            make_passes(args, self.objective, self.sharded),
            args.negatives_per_step,
            args.reference_prompt,
            backward=lambda loss, last: sharding.backward(self.accelerator, loss, last),
            around=self._around_passes,
            spare=train_rows[0],
        )
        self.engine.computes_in = self._layers_in
        if not self.sharded:  # else no pass is possible before the parameters are distributed
            self._choose_layout(self.model)

    @property
    def log_u(self) -> Tensor:
        """float32 [examples], the logarithms of the moving averages in the order of the data set."""
        return self.engine.log_u.values

    @property
    def layout(self) -> str:
        """The layout of rows, "packed" or "padded"."""
        return self.engine.passes.layout

    def _choose_layout(self, model: nn.Module) -> None:
        """Chooses the layout in the precision of the weights, as scores are compared with the model's own logits."""
        self.engine.passes.layout = layout_of(model, self.args.layout)

    @contextlib.contextmanager
    def _around_passes(self) -> Iterator[None]:
        """The context of lowdft's passes; outside it, for example in callbacks, the model is unchanged."""
        with contextlib.ExitStack() as stack:
            if not self.sharded:  # the fused function would skip the hooks that gather sharded weights
                stack.enter_context(fused_lora(self.model))
            stack.enter_context(layers_in(self._layers_in))
            if self._layers_in or self.model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16):
                stack.enter_context(without_input_casts(self.model))  # autocast casts instead, without copies
            if self.args.offload_checkpoints and torch.is_grad_enabled():
                stack.enter_context(save_on_cpu(pin_memory=self.args.device.type == "cuda"))
            yield

    # ---- called by transformers' loop -------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """This rank's micro-batches of every epoch; the last ones may be empty."""
        return train_loader(self.train_dataset, self.args)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collects the micro-batches of one optimizer step and begins the step."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self.engine.begin([inputs["batch"] for inputs in samples], self.state.global_step + 1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Accumulates the gradient of a micro-batch, updates `log_u`, and returns its share of the step's loss."""
        model.train()
        return self.engine.accumulate(inputs["batch"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's mean loss as in evaluation, without gradient (`StepEngine.evaluate`)."""
        self._drive(model)
        loss = self.engine.evaluate(inputs["batch"])
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation's loss."""
        return self.compute_loss(model, inputs), None, None

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Raises UserError: only `evaluate` is supported."""
        raise UserError(
            "DFTTrainer does not support predict: evaluation never computes full logits. To measure other rows, call "
            'evaluate(rows, metric_key_prefix="test").'
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """transformers' evaluate; the rows may be text or ids, as for training.

        Raises:
            UserError: the rows have no reference log-probabilities, and the model can no longer compute them.
        """
        self._encoder.truncation = Truncation()
        chosen = self._encode(self.eval_dataset if eval_dataset is None else eval_dataset)
        if cuts := self._encoder.cuts():
            warnings.warn(cuts, stacklevel=2)
        if isinstance(chosen, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if chosen not in known:
                raise UserError(
                    f"evaluate({chosen!r}): there is no such evaluation set (known: {', '.join(known) or 'none'}). "
                    "Pass a known name, or rows."
                )
        else:
            at_hand = self._at_hand or (self._starts_from_base and self.state.global_step == 0)
            check_evaluation(as_list(chosen), self.objective, self.args, at_hand)
            check_ids(as_list(chosen), self.model)
        return super().evaluate(None if eval_dataset is None else chosen, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """transformers' loop; adds the objective's metrics for this evaluation only."""
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
        """Not computed: transformers' estimate ignores shared prompts and frozen weights."""
        return 0

    def _logged_table(self) -> Tensor | None:
        return self.log_u if self.objective.uses_log_u else None

    # ---- beginning and resuming -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains. With `resume_from_checkpoint` it resumes, with the same numbers as an uninterrupted run."""
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
            check_reference(self.model, self._datasets(), self.objective, self.args, resuming, self._at_hand)
        out = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self.before_saving()
        return out

    def after_preparation(self, model: nn.Module, resuming: bool) -> None:
        """Computes missing reference scores of the rows with the initial weights, sharded or not."""
        self._drive(model)
        self._checked = None
        if self.sharded:
            self._choose_layout(self.engine.policy)
        if self.objective.uses_any_reference:
            rows = self._datasets()
            self.engine.starts_as_reference = starts_as_reference(self.model, self.args)
            with self._around_passes():
                how = (self.objective, self.args, self.engine.passes, resuming, self._at_hand)
                attach_reference(self.engine.policy, rows, *how)
            self.engine.spare = self.train_dataset[0]  # has its reference, which no rank could score later

    def before_optimizer_step(self, gradient_norm: object) -> None:
        """Stops before a non-finite gradient is applied (with fp16, the loss scaler skips such steps)."""
        self.engine.check_gradient(float(gradient_norm), scaled=self.args.fp16)

    def before_saving(self) -> None:
        """Stops before saving weights that no longer give finite scores; checks them once per step."""
        if self._checked != self.state.global_step:
            self.engine.check_weights()
        self._checked = self.state.global_step

    @property
    def _at_hand(self) -> bool:
        """Whether the reference is the model with its adapter off, even after training."""
        return self._starts_from_base and isinstance(self.model, PeftModel) and not trained_beside(self.model)

    def _drive(self, model: nn.Module) -> None:
        """The engine's model: DDP's copies without the wrapper, because gradients are averaged once per step."""
        self.engine.model = model if self.sharded else self.accelerator.unwrap_model(model)

    def _datasets(self) -> list[EncodedRows]:
        return [self.train_dataset, *as_list(self.eval_dataset)]

    def save_beside(self, folder: Path) -> None:
        """Saves the rest of the state for an exact resume: `log_u`, and the budget of passes."""
        save_table(folder / STATE_FILE, self.engine.state_dict(), self._fingerprint)
