"""`DFTTrainer`: transformers' Trainer with one `compute_loss`.

How a prompt becomes a gradient: the batch says which negatives this visit uses, `logps.score` gives the summed
log-probabilities of negatives and completion, the objective turns them into one loss a prompt and the new `log_u`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from lowdft import objectives
from lowdft.config import DFTConfig
from lowdft.data.batch import Batch, EncodedDataset, collate
from lowdft.data.encode import Encoder
from lowdft.errors import UserError
from lowdft.files import WRITE_ERRORS, flush_to_disk, reason
from lowdft.log_u import LogU
from lowdft.logps import choose_layout, score
from lowdft.metrics import StepMetrics
from lowdft.objectives import Scores
from lowdft.reference import adapter_off, negative_logps
from lowdft.training_set import attach_reference, check_rows, fingerprint

LOG_U_FILE = "log_u.safetensors"
FADED_WEIGHT, FADED_STEPS = 0.01, 5


class DFTTrainer(Trainer):
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
            model cannot give.
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
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        if peft_config is not None:
            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        self.objective = objectives.get(args.objective)
        encoder = Encoder(processing_class, args.max_length, args.max_prompt_length) if processing_class else None
        train_rows = _encode(train_dataset, encoder)
        check_rows(train_rows, self.objective, args)
        if encoder and (cut := encoder.truncation.words(args.max_length, args.max_prompt_length)):
            warnings.warn(cut, stacklevel=2)
        if eval_dataset is not None:
            eval_dataset = EncodedDataset(_encode(eval_dataset, encoder))
            check_rows(eval_dataset.rows, self.objective, args, training=False)
        self._log_u = LogU(len(train_rows), args.log_u_init, fingerprint(train_rows, args))
        self._metrics = {"train": StepMetrics(), "eval": StepMetrics()}
        self._step_prompts, self._step_tokens = 1, 1
        self._faded = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=EncodedDataset(train_rows),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collate,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True
        self.layout = args.layout or choose_layout(self.model)
        if self.layout == "padded" and args.layout is None:
            warnings.warn(
                "this model takes no 4-D attention mask: every completion becomes a row of its own, and the "
                "prompt is computed once for each",
                stacklevel=2,
            )

    @property
    def log_u(self) -> Tensor:
        """float32 [examples], the moving averages in the dataset's order."""
        return self._log_u.values

    # ---- one step -----------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's loss: the objective's value, with the surrogate's gradient."""
        batch = inputs["batch"]
        training = model.training
        visits_M = self._log_u.visits[batch.index_M] if training else torch.zeros(len(batch), dtype=torch.int64)
        scores = self._scores(model, batch, visits_M, training)
        losses = self.objective.compute(scores, **self.args.hyperparameters())
        if training:
            self._log_u.update(batch.index_M, losses.log_u_M)
        self._metrics["train" if training else "eval"].add(scores, losses, self.objective.per_token, batch)
        prompts = self._step_prompts if training else len(batch)
        surrogate = losses.surrogate_M.sum() / prompts
        value = losses.value_M.sum() / prompts
        loss = surrogate + (value - surrogate).detach()
        if training:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, losses) if return_outputs else loss

    def _scores(self, model: nn.Module, batch: Batch, visits_M: Tensor, training: bool) -> Scores:
        count = self.args.negatives_per_step if "negatives" in self.objective.needs else 0
        negatives = batch.negatives(visits_M, count) if count else [[] for _ in batch.rows]
        out = score(model, batch.groups(negatives), self.layout, self.args.logits_chunk_size)
        logps, tokens = out.logps_C.view(len(batch), count + 1), out.tokens_C.view(len(batch), count + 1)
        scores = Scores(
            policy_logps_M=logps[:, -1],
            completion_tokens_M=tokens[:, -1],
            tokens_per_prompt=self._step_tokens / self._step_prompts
            if training
            else batch.completion_tokens / len(batch),
        )
        if count:
            scores.policy_negative_logps_MB, scores.negative_tokens_MB = logps[:, :-1], tokens[:, :-1]
        if "reference" in self.objective.needs:
            scores.ref_negative_logps_MB = self._reference(model, batch, visits_M, negatives, logps)
            self._metrics["train"].gap(scores, first_step=training and self.state.global_step == 0)
        if "log_u" in self.objective.needs and training:
            scores.log_u_M = self._log_u.values[batch.index_M].to(logps.device)
        return scores

    def _reference(self, model, batch: Batch, visits_M, negatives, logps) -> Tensor:
        """Reference log-probabilities [M, B] of this visit's negatives, as a constant."""
        if all("ref_negative_logps" in row for row in batch.rows):
            return batch.ref_negative_logps(visits_M, len(negatives[0])).to(logps)
        prompt = "prompt_ids" if self.args.reference_prompt == "training" else "sampling_prompt_ids"
        groups = batch.groups(negatives, prompt, completions=False)
        with adapter_off(self.accelerator.unwrap_model(model)) as base:
            ref = negative_logps(base, groups, self.layout, self.args.logits_chunk_size)
        return ref.view(len(batch), -1).to(logps)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Takes the micro-batches of one optimizer step and counts its prompts and completion tokens, on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [inputs["batch"] for inputs in samples]
        counts = torch.tensor([[sum(map(len, batches)), sum(b.completion_tokens for b in batches)]], device=device)
        prompts, tokens = self.accelerator.gather(counts).sum(0).tolist()
        self._step_prompts, self._step_tokens = max(1, prompts), max(1, tokens)
        return samples, prompts

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
            table = self.log_u if "log_u" in self.objective.needs else None
            logs |= {prefix + key: value for key, value in self._metrics[mode].flush(table).items()}
            self._tell_when_faded(logs.get("weights/mean"))
        super().log(logs, start_time)

    def _tell_when_faded(self, mean_weight: float | None) -> None:
        """Says once, in words, when the negatives have stopped pulling: from there DFT is SFT with a bill."""
        self._faded = self._faded + 1 if mean_weight is not None and mean_weight < FADED_WEIGHT else 0
        if self._faded == FADED_STEPS:
            warnings.warn(
                f"the mean weight of the negatives has been under {FADED_WEIGHT} for {FADED_STEPS} log lines (now "
                f"{mean_weight:.1e}): they are already so unlikely that training is supervised fine-tuning at a "
                "higher price. Try a lower learning rate, harder negatives (negatives.strategy), a larger tau, or "
                "fewer epochs.",
                stacklevel=2,
            )

    # ---- the reference, once -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; with `resume_from_checkpoint`, goes on from there with the very numbers it would have had."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir}: has no checkpoint to go on from")
        if resume_from_checkpoint:
            self._log_u.load(Path(resume_from_checkpoint) / LOG_U_FILE)
        if "reference" in self.objective.needs:
            rows, resuming = self.train_dataset.rows, bool(resume_from_checkpoint)
            attach_reference(self.model, rows, self.args, self.layout, resuming)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    # ---- checkpoints: whole or not there ----------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint with `log_u` beside its place and renames it, so that no half one is ever resumed."""
        run_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        partial = run_dir / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._checkpoint_dir = partial
            super()._save_checkpoint(model, trial)
            self._log_u.save(partial / name / LOG_U_FILE)
            flush_to_disk(partial / name)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(partial / name, run_dir / name)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{self.state.best_global_step}")
        except (*WRITE_ERRORS, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise UserError(
                f"{run_dir / name}: the checkpoint could not be written ({reason(error)}). Earlier "
                "checkpoints are whole; free some space and run the same command again to go on from the last one."
            ) from error
        finally:
            self._checkpoint_dir = None
            shutil.rmtree(partial, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    _checkpoint_dir: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return str(self._checkpoint_dir) if self._checkpoint_dir else super()._get_output_dir(trial)


def _encode(dataset, encoder: Encoder | None) -> list[dict]:
    """Rows of ids from rows of text or of ids."""
    rows = list(dataset)
    if encoder is None:
        if any("prompt_ids" not in row for row in rows):
            raise UserError(
                "rows of text need a tokenizer: pass processing_class, or rows with prompt_ids, "
                "completion_ids and negative_ids"
            )
        encoder = Encoder(_NoTokenizer())
    return encoder.rows(rows)


class _NoTokenizer:
    chat_template = "none"
