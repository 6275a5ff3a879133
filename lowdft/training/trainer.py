"""`DFTTrainer`: transformers' Trainer with one `compute_loss`.

How a prompt becomes a gradient: the batch says which negatives this visit uses, `passes` scores negatives and
completion within a budget of tokens, the objective turns the summed log-probabilities into one loss a prompt and the
new `log_u`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import AutoTokenizer

from lowdft import objectives
from lowdft.config.requirements import check_datasets
from lowdft.config.training import DFTConfig
from lowdft.data.batch import Batch, collate
from lowdft.data.encode import Encoder
from lowdft.data.encoded import EncodedRows
from lowdft.data.prepare import encode_rows
from lowdft.distributed import collectives, sharding
from lowdft.errors import UserError
from lowdft.files import read_json, write_json
from lowdft.logprobs import Group, bare, choose_layout, packed_attention
from lowdft.models.adapters import adapter_digest, make_policy
from lowdft.models.reference import attach_reference, check_reference
from lowdft.objectives import Losses, Scores
from lowdft.training.checkpoints import WholeCheckpoints, newest_whole, require_whole
from lowdft.training.log_u import LogU, table_identity
from lowdft.training.metrics import Faded, StepMetrics, check_gap
from lowdft.training.score_inputs import mismatched_gain, prepare
from lowdft.training.step import Step
from lowdft.training.token_budget import Passes

LOG_U_FILE, PASSES_FILE = "log_u.safetensors", "passes.json"


class DFTTrainer(WholeCheckpoints):
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
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        self.objective = objectives.get(args.objective)
        encoder = Encoder(processing_class, args.max_length, args.max_prompt_length) if processing_class else None
        train_rows = encode_rows(train_dataset, encoder)
        eval_rows = None if eval_dataset is None else encode_rows(eval_dataset, encoder)
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        for note in check_datasets(train_rows, eval_rows, self.objective, args, has_adapter):
            warnings.warn(note, stacklevel=2)
        if encoder and (cut := encoder.truncation.words(args.max_length, args.max_prompt_length)):
            warnings.warn(cut, stacklevel=2)
        model = make_policy(model, args, peft_config)
        reference = adapter_digest(args.reference_adapter) if args.reference_adapter else "base"
        self._log_u = LogU(len(train_rows), args.log_u_init, table_identity(train_rows, args, reference))
        self._metrics = {"train": StepMetrics(), "eval": StepMetrics()}
        self._step = Step()
        self._faded = Faded()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            data_collator=collate,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True
        self.sharded = sharding.is_sharded(self.accelerator)
        self._count = args.negatives_per_step if self.objective.uses_negatives else 0
        settings, weight = args.hyperparameters(), self.objective.token_weight
        self._passes = Passes(
            args.layout or "padded",
            args.logits_chunk_size,
            args.tokens_per_pass,
            args.skip_negligible,
            backward_cost=2.4 if args.gradient_checkpointing else 1.4,
            knows_last=self.objective.linear,
            token_weight=weight and partial(weight, **settings),
            predicted_share=settings["predicted_share"] if self.objective.uses_predictions else 0.0,
            in_step=self.sharded,
        )
        if not self.sharded:  # else no pass is possible before the parameters have their places
            self._choose_layout(self.model)

    @property
    def log_u(self) -> Tensor:
        """float32 [examples], the moving averages in the dataset's order."""
        return self._log_u.values

    @property
    def layout(self) -> str:
        """How rows are laid out, "packed" or "padded"."""
        return self._passes.layout

    def _choose_layout(self, model: nn.Module) -> None:
        if self.args.layout is None:
            self._passes.layout = choose_layout(model)
            if self.layout == "padded":
                warnings.warn(
                    "this model's attention does not take packed rows: every completion becomes a row of its own, and "
                    "the prompt is computed once for each",
                    stacklevel=2,
                )

    # ---- one step -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Takes the micro-batches of one optimizer step and counts its prompts and completion tokens, on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if collectives.world_size() > 1 and not self.args.dataloader_drop_last:
            again = collectives.repeated([inputs["batch"].index_M for inputs in samples], self._log_u.visits)
            for inputs, skip in zip(samples, again, strict=True):
                inputs["batch"] = inputs["batch"].select([i for i, skipped in enumerate(skip) if not skipped])
        batches = [inputs["batch"] for inputs in samples]
        counts = torch.tensor([[sum(map(len, batches)), sum(b.completion_tokens for b in batches)]], device=device)
        prompts, tokens = self.accelerator.gather(counts).sum(0).tolist()
        self._step = Step(max(1, prompts), max(1, tokens), self._mismatched_gain(batches))
        if batches:
            self._step.remember(self._log_u, torch.cat([b.index_M for b in batches]), self._metrics["train"])
        return samples, prompts

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch: accumulates its gradient, updates `log_u`, returns its share of the step's loss."""
        model.train()
        if collectives.world_size() > 1:
            return self._among_ranks(model if self.sharded else self.accelerator.unwrap_model(model), inputs["batch"])
        while True:
            try:
                loss = self._accumulate(model, inputs["batch"])
                self._step.done.append(inputs["batch"])
                return loss
            except torch.OutOfMemoryError as error:
                self._passes.shrink(self._groups(inputs["batch"], self._log_u.visits[inputs["batch"].index_M]), error)
            for batch in self._step.begin_again(self._log_u, self._metrics["train"], model):
                self._accumulate(model, batch)
                self._step.done.append(batch)

    def _among_ranks(self, model: nn.Module, batch: Batch) -> Tensor:
        """A micro-batch on one of several ranks: afterwards all know all updates of `log_u`, and share the gradient."""
        if len(batch) or self.sharded:
            try:
                loss = self._accumulate(model, batch) if len(batch) else self._idle(model)
            except torch.OutOfMemoryError as error:
                raise self._passes.no_room() from error
        else:
            loss = torch.zeros((), device=self.args.device)
        mine = (batch.index_M, self._log_u.values[batch.index_M], self._log_u.visits[batch.index_M])
        index, *updates = collectives.updates_from_all(*mine, self.args.per_device_train_batch_size, self.args.device)
        self._log_u.values[index], self._log_u.visits[index] = updates
        if self.accelerator.sync_gradients and not self.sharded:
            collectives.average_gradients(model.parameters())
        return loss

    def _accumulate(self, model: nn.Module, batch: Batch) -> Tensor:
        visits_M = self._log_u.visits[batch.index_M]
        groups = self._groups(batch, visits_M)
        given = self._given(model, batch, visits_M, self._step)

        def losses(numbers: Sequence[int], logps_MK: Tensor) -> tuple[Scores, Losses]:
            chosen = list(numbers)
            part = {name: value[chosen] for name, value in given.items()}
            return self._losses([groups[i] for i in chosen], logps_MK, part, self._step)

        def surrogate(numbers: Sequence[int], logps_MK: Tensor) -> Tensor:
            return losses(numbers, logps_MK)[1].surrogate_M.sum() / self._step.prompts

        scored = self._passes.backpropagate(model, groups, surrogate, self._backward)
        scores, final = losses(range(len(batch)), scored.logps_MK)
        self._log_u.update(batch.index_M, final.log_u_M)
        self._metrics["train"].add(scores, final, self.objective, batch, scored)
        if self.state.global_step == 0:
            self._metrics["train"].gap(scores)
            if self._starts_as_reference:
                check_gap(scores, batch, self.model.get_output_embeddings().weight.dtype)
        return final.value_M.sum() / self._step.prompts * self.accelerator.num_processes

    def _idle(self, model: nn.Module) -> Tensor:
        """What a rank without an example in this micro-batch runs beside the others: passes of weight 0."""
        spare = Batch(torch.zeros(1, dtype=torch.int64), [self.train_dataset[0]])
        visits_M = self._log_u.visits[spare.index_M]
        self._given(model, spare, visits_M, self._step)
        groups = self._groups(spare, visits_M)
        self._passes.backpropagate(model, groups, lambda numbers, logps_MK: 0 * logps_MK.sum(), self._backward)
        return torch.zeros((), device=self.args.device)

    def _backward(self, loss: Tensor, last: bool) -> None:
        sharding.backward(self.accelerator, loss * self.accelerator.num_processes, last)  # ranks' mean is taken

    def _groups(self, batch: Batch, visits_M: Tensor) -> list[Group]:
        """What this visit of each prompt scores."""
        return batch.groups(batch.negatives(visits_M, self._count), negatives_scored=self.args.negatives_scored)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's share of the step's loss in one graph: the objective's value, the surrogate's gradient."""
        batch, training = inputs["batch"], model.training
        visits_M = self._log_u.visits[batch.index_M] if training else torch.zeros(len(batch), dtype=torch.int64)
        groups = self._groups(batch, visits_M)
        out = self._passes.forward(model, groups)
        step = self._step
        if not training:
            step = Step(len(batch), batch.completion_tokens, self._mismatched_gain([batch]))
        given = self._given(model, batch, visits_M, step)
        scores, losses = self._losses(groups, out.logps_C.view(len(batch), -1), given, step)
        if training:
            self._log_u.update(batch.index_M, losses.log_u_M)
        self._metrics["train" if training else "eval"].add(scores, losses, self.objective, batch)
        surrogate, value = losses.surrogate_M.sum() / step.prompts, losses.value_M.sum() / step.prompts
        loss = surrogate + (value - surrogate).detach()
        return (loss, losses) if return_outputs else loss

    def _losses(self, groups: Sequence[Group], logps_MK: Tensor, given: dict, step: Step) -> tuple[Scores, Losses]:
        """The objective on a scored micro-batch; of K completions the negatives come first."""
        tokens_MK = torch.tensor([group.scored_tokens for group in groups], device=logps_MK.device)
        scores = Scores(logps_MK[:, -1], tokens_MK[:, -1], tokens_per_prompt=step.tokens / step.prompts)
        if self._count:
            scores.policy_negative_logps_MB, scores.negative_tokens_MB = logps_MK[:, :-1], tokens_MK[:, :-1]
        for name, value in given.items():
            setattr(scores, name, value.to(logps_MK))
        return scores, self.objective.compute(scores, **self.args.hyperparameters())

    def _mismatched_gain(self, batches: Sequence[Batch]) -> float:
        if not self.objective.uses_mismatched:
            return 0.0
        return mismatched_gain(self.accelerator.unwrap_model(self.model), batches, self._passes)

    def _given(self, model: nn.Module, batch: Batch, visits_M: Tensor, step: Step) -> dict[str, Tensor]:
        bare_policy = self.accelerator.unwrap_model(model)
        given = prepare(bare_policy, batch, visits_M, self._count, self.objective, self.args, self._passes)
        if self.objective.uses_log_u and model.training:
            given["log_u_M"] = self._log_u.values[batch.index_M]
        if self.objective.uses_mismatched:
            given["mismatched_gain_M"] = torch.full((len(batch),), step.mismatched_gain, dtype=torch.float64)
        return given

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation: the loss without a moving average (as with gamma = 1), on each row's first B negatives."""
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate knows neither shared prompts nor frozen weights."""
        return 0

    # ---- what people see ------------------------------------------------------------------------------------------

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds the objective's metrics (design: `logps/*`, `weights/*`, `margin`, …) to transformers' log line."""
        mode, prefix = ("eval", "eval_") if any(key.startswith("eval_") for key in logs) else ("train", "")
        if "loss" in logs or mode == "eval":
            table = self.log_u if self.objective.uses_log_u else None
            logs |= {prefix + key: value for key, value in self._metrics[mode].flush(table).items()}
            self._faded.see(logs.get("weights/mean"))
        super().log(logs, start_time)

    # ---- the reference, once -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; with `resume_from_checkpoint`, goes on from there with the very numbers it would have had."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir}: has no checkpoint to go on from")
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            require_whole(folder)
            sharding.check_pickles(folder, self.trust_checkpoint)
            sharding.check_checkpoint(folder, self.accelerator)
            sharding.fit_checkpoint(folder, self.accelerator)
            self._log_u.load(folder / LOG_U_FILE)
            vars(self._passes).update(read_json(folder / PASSES_FILE))
        if self.objective.uses_any_reference:
            resuming = bool(resume_from_checkpoint)
            check_reference(self.model, self._datasets(), self.objective, self.args, resuming)
        with contextlib.ExitStack() as self._while_training:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """transformers' preparation; then the initial weights, sharded or not, score what reference rows lack."""
        model, dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        whole = self.accelerator.unwrap_model(model)
        if self.sharded:
            self._choose_layout(whole)
        if self.objective.uses_any_reference:
            resuming = resume_from_checkpoint is not None
            attach_reference(whole, self._datasets(), self.objective, self.args, self._passes, resuming)
        self._keep_layers_ready(self._while_training)
        return model, dataloader

    def _datasets(self) -> list[EncodedRows]:
        return [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]

    @cached_property
    def _starts_as_reference(self) -> bool:
        """Is the policy, before the first step, the model that scored the reference, on the same prompts?"""
        fresh = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        return (
            self.args.reference_prompt == "training" and bool(fresh) and not any(bool(p.detach().any()) for p in fresh)
        )

    def _keep_layers_ready(self, stack: contextlib.ExitStack) -> None:
        """Layers stay as scoring sets them until the last backward pass: checkpointed ones run again there."""
        if self.layout == "packed":
            stack.enter_context(packed_attention(bare(self.model)))
        if self.model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16):
            stack.enter_context(disable_input_dtype_casting(self.model))  # autocast serves; no float32 copies
        if self.args.offload_checkpoints:
            stack.enter_context(save_on_cpu(pin_memory=self.args.device.type == "cuda"))

    def save_beside(self, folder: Path) -> None:
        """`log_u`, and what decides how a step is split into passes: rounding depends on it."""
        self._log_u.save(folder / LOG_U_FILE)
        write_json(folder / PASSES_FILE, {n: getattr(self._passes, n) for n in ("budget", "expected_skips")})
