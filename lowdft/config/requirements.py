"""Checks what an objective requires of rows, adapter and settings, for recipes and for `DFTTrainer`.

Every check runs before a model is loaded and reports all rows that fail it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lowdft.config.sections import NegativesSection
from lowdft.config.training import DFTConfig
from lowdft.data.encoded import EncodedRows
from lowdft.data.examples import Examples
from lowdft.errors import UserError
from lowdft.models.reference import rows_with_reference
from lowdft.objectives import Objective


@dataclass
class RowFacts:
    """The facts about n rows that the checks need.

    Args:
        names: gives the names of rows in messages, from their positions: their place in a file, or their `example_id`.
        negatives_N: int [n], how many negatives each row has; None if they are yet to be generated.
        has_aligned_N, has_reference_N: bool [n], which rows have `aligned_logps`, or the reference log-probabilities
            that the objective uses.
        empty: positions of rows whose prompt, completion or any negative has no tokens.
    """

    names: Callable[[Iterable[int]], list[str]]
    negatives_N: np.ndarray | None
    has_aligned_N: np.ndarray
    has_reference_N: np.ndarray
    empty: np.ndarray

    @classmethod
    def of(cls, rows: EncodedRows, objective: Objective) -> RowFacts:
        """The facts about encoded rows."""
        return cls(
            names=rows.example_ids,
            negatives_N=rows.lengths("negative_ids"),
            has_aligned_N=rows.has("aligned_logps"),
            has_reference_N=rows_with_reference(rows, objective),
            empty=rows.without_tokens(),
        )

    @classmethod
    def of_examples(cls, examples: Examples, ready: bool) -> RowFacts:
        """The facts about rows of text.

        Args:
            ready: the rows have their own negatives.
        """
        negatives_N = examples.negatives_N if ready else None
        scored_N, empty = np.zeros(len(examples), bool), np.zeros(0, int)
        return cls(examples.sources, negatives_N, examples.has_aligned_N, scored_N, empty)

    def __len__(self) -> int:
        return len(self.has_aligned_N)


def check_datasets(
    train_rows: EncodedRows,
    eval_sets: Sequence[EncodedRows],
    objective: Objective,
    args: DFTConfig,
    has_adapter: bool,
) -> list[str]:
    """Checks the data sets and the model given to `DFTTrainer`; returns notes for people.

    Args:
        has_adapter: the model has an adapter, or gets a new one.

    Raises:
        UserError: a requirement is not met.
    """
    if args.reference_adapter and has_adapter:
        raise UserError(
            "training.reference_model: adapter:… loads its own adapter, but the model already has one or gets one from "
            "peft_config; pass the base without an adapter"
        )
    facts = [RowFacts.of(rows, objective) for rows in (train_rows, *eval_sets)]
    notes = [note for i, one in enumerate(facts) for note in check_rows(one, objective, args, training=i == 0)]
    all_scored = all(one.has_reference_N.all() for one in facts)
    if args.reference_prompt == "proposal" and not all_scored:
        raise UserError(
            "training.reference_prompt: proposal requires rows with ref_negative_logps; run `lowdft score` first"
        )
    asked = all(rows.has("sampling_prompt_ids").all() for rows in (train_rows, *eval_sets))
    if args.reference_prompt == "sampling" and objective.uses_reference and not (all_scored or asked):
        raise UserError(
            "training.reference_prompt: sampling requires that every row has the prompt from which its negatives were "
            "sampled: sampling_prompt (text or messages) or sampling_prompt_ids. Add that column, or set "
            "reference_prompt: training."
        )
    check_adapter(args, objective, has_adapter or args.reference_adapter is not None, all_scored)
    return notes


def check_rows(rows: RowFacts, objective: Objective, args: DFTConfig, training: bool = True) -> list[str]:
    """Checks that rows can be used with this objective for training, or (`training=False`) for evaluation.

    Returns notes for people.

    Raises:
        UserError: lists every requirement that is not met, with how many rows fail it and the first of them.
    """
    if not len(rows):
        raise UserError("the data set is empty; at least one row is needed")
    faults = []
    if len(rows.empty):
        faults.append(f"{_some(rows, rows.empty)} have an empty prompt, completion or negative. Remove these rows.")
    lacking = np.flatnonzero(~rows.has_aligned_N)
    if objective.uses_aligned and len(lacking):
        faults.append(
            f"{_some(rows, lacking)} have no `aligned_logps`, which training.objective {objective.name} requires: the "
            "completion's mean log-probability per token under aligned models, which you compute beforehand. Add that "
            "column, or choose another objective."
        )
    notes = []
    if objective.uses_negatives and rows.negatives_N is not None:
        short = np.flatnonzero(rows.negatives_N < args.negatives_per_step)
        if len(short):
            faults.append(
                f"{_some(rows, short)} have too few negatives (the fewest: {rows.negatives_N.min()}); "
                f"training.negatives_per_step={args.negatives_per_step} requires that many per row. Lower it, or add "
                "negatives (in a recipe, negatives.source: generate)."
            )
        elif training:
            notes = _reuse(int((rows.negatives_N < negatives_used(args, len(rows))).sum()), args, len(rows))
    if faults:
        raise UserError("\n".join(faults))
    return notes


def check_steps(args: DFTConfig, n: int) -> list[str]:
    """Checks that n rows fill an optimizer step; returns notes for people.

    Raises:
        UserError: they do not, and `dataloader_drop_last` would leave nothing to train on.
    """
    per_step = args.prompts_per_step
    if n >= per_step:
        return []
    if args.dataloader_drop_last:
        raise UserError(
            f"{n} rows do not fill one optimizer step of {per_step} prompts, and training.dataloader_drop_last drops "
            "incomplete steps; lower training.per_device_train_batch_size or gradient_accumulation_steps"
        )
    return [f"{n} rows are fewer than the {per_step} of one optimizer step; every epoch is one smaller step"]


def check_precision(args: DFTConfig, dtype: str | None = None) -> None:
    """Raises UserError for float16 without loss scaling, in which small gradients vanish.

    Args:
        dtype: of the base, in a recipe.
    """
    if args.fp16 and args.device.type == "cpu":
        raise UserError(
            "training.fp16 is true, and there is no loss scaling on a CPU, without which small gradients vanish. Set "
            "training.bf16: true, or neither."
        )
    if dtype == "float16" and not args.fp16:
        raise UserError(
            "model.dtype is float16, whose gradients vanish without loss scaling. Set model.dtype: bfloat16 or float32,"
            " or training.fp16: true with an adapter (GPU only)."
        )


def check_evaluations(args: DFTConfig, held_out: int) -> None:
    """Raises UserError if a recipe asks for evaluation during training but has no rows for it."""
    if args.eval_strategy != "no" and not held_out:
        raise UserError(
            f"training.eval_strategy is {args.eval_strategy.value}, but no rows are held out. Set data.eval or "
            "data.eval_rows, or remove eval_strategy: held-out rows are evaluated after training anyway."
        )


def check_generated(per_prompt: int | None, args: DFTConfig, n: int) -> list[str]:
    """Checks that `negatives.per_prompt` generated negatives are enough for n prompts; returns notes for people."""
    if per_prompt is None:
        return []
    if per_prompt < args.negatives_per_step:
        raise UserError(
            f"negatives.per_prompt is {per_prompt}; training.negatives_per_step={args.negatives_per_step} requires "
            "that many per prompt. Raise the first, or lower the second."
        )
    return _reuse(n if per_prompt < negatives_used(args, n) else 0, args, n)


def check_proposal(
    negatives: NegativesSection, args: DFTConfig, objective: Objective, rows: Examples, ready: bool
) -> None:
    """Raises UserError if `reference_prompt: proposal` does not match how the negatives were made.

    Args:
        ready: the rows have their own negatives.
    """
    if args.reference_prompt != "proposal" or not objective.uses_reference:
        return
    unlike = {
        "the rows have their own negatives": ready,
        "negatives.stop ends them early": bool(negatives.stop),
        "negatives.strategy few_shot ends them at a line break": (
            negatives.strategy == "few_shot" and any(isinstance(row.completion, str) for row in rows)
        ),
        "negatives.resample replaces some of them": negatives.resample > 0,
        "negatives.keep: wrong replaces some of them": negatives.keep == "wrong",
        "negatives.temperature is 0, so nothing is sampled": negatives.temperature == 0,
        "they are sampled from negatives.adapter, which is not training.reference_model": (
            negatives.adapter is not None and negatives.adapter != args.reference_adapter
        ),
    }
    found = [reason for reason, holds in unlike.items() if holds]
    if found:
        raise UserError(
            "training.reference_prompt: proposal uses the density of the sampler that wrote the negatives, which is "
            f"unknown here: {'; '.join(found)}. Set training.reference_prompt: training or sampling, or change this."
        )


def check_adapter(args: DFTConfig, objective: Objective, has_adapter: bool, all_scored: bool = False) -> None:
    """Raises UserError if training without an adapter uses a setting that needs one.

    Args:
        all_scored: all rows have reference log-probabilities.
    """
    if has_adapter:
        return
    if args.reference == "online" and objective.uses_any_reference and not all_scored:
        raise UserError(
            "training.reference: online needs an adapter to switch off. To train all parameters, use reference: "
            "precomputed, which scores once with the initial weights before the first step."
        )
    if args.freeze_half:
        raise UserError("training.freeze_half freezes half of an adapter's modules, but there is no adapter; remove it")


def negatives_used(args: DFTConfig, n: int) -> int:
    """How many negatives a prompt needs so that none is used twice: B for each time that it is trained on."""
    if args.max_steps > 0:
        return math.ceil(args.max_steps * args.prompts_per_step / n) * args.negatives_per_step
    return math.ceil(args.num_train_epochs) * args.negatives_per_step


def _reuse(count: int, args: DFTConfig, n: int) -> list[str]:
    """A note if negatives are used again. (In the paper's Algorithm 1, too, negatives come from a finite set.)"""
    if not count:
        return []
    used = negatives_used(args, n)
    return [f"{count} of {n} rows have fewer than the {used} negatives that training uses per row; they reuse theirs"]


def _some(rows: RowFacts, numbers: np.ndarray) -> str:
    shown = ", ".join(rows.names(numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{len(numbers)} of {len(rows)} rows ({'first: ' if len(numbers) > 5 else ''}{shown})"
