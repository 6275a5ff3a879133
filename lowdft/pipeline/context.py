"""`Run`: a recipe with its data, base and run folder. Everything is computed when it is first accessed.

All checks that need no model are made before one is loaded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from lowdft import models, objectives
from lowdft.config import requirements
from lowdft.config.loop import check_best_model, check_loop
from lowdft.config.recipe import Recipe, save_recipe, training_config
from lowdft.config.requirements import RowFacts
from lowdft.data import Example
from lowdft.data.encode import Encoder
from lowdft.data.encoded import EncodedRows
from lowdft.data.examples import Examples
from lowdft.data.prepare import Tokenizing, prepare
from lowdft.data.prompting import plain_text, sampling_ids
from lowdft.data.splits import SPLITS, Splits, load_splits
from lowdft.distributed import collectives
from lowdft.errors import InvalidRows, UserError
from lowdft.evaluation import answers
from lowdft.models.reference import FIELDS, REFERENCE_NEEDS
from lowdft.pipeline import identity
from lowdft.pipeline.artifact import Product, require_matching

__all__ = ["SPLITS", "Run", "say"]
say = logging.getLogger("lowdft").info  # one line for people, which the command line prints on the first rank


class Run:
    """A recipe with its data, its base and its folder. Attributes are cached.

    Three attributes are set by the command line only. `trust_checkpoint`: resume even from checkpoints that may run
    code. `push_negatives`: upload the negatives to the recipe's `negatives.push`. `evaluation_follows`: this command
    evaluates as well.

    Raises:
        UserError: the recipe, the data and the run folder do not fit together; before any model is loaded.
    """

    trust_checkpoint = push_negatives = evaluation_follows = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.args = training_config(recipe)
        self.objective = objectives.get(self.args.objective)

    def check(self) -> None:
        """Makes all checks that need no model, also of the run folder (of its evaluation only if this command
        evaluates), and writes the resolved recipe into it."""
        for note in self._requirements():
            warnings.warn(note, stacklevel=2)
        products = [self.negatives("train"), self.negatives("heldout"), self.reference, self.training]
        if self.evaluation_follows and self.examples("heldout"):
            products += [self.base_evaluation, self.evaluation]
        require_matching(products)
        if not self.training.is_done():  # a trained model may go to a machine without the optimizer's packages
            check_best_model(self.args)
            check_loop(self.args)
            self._check_adapter()
        self._check_templates()
        if collectives.rank() == 0:
            save_recipe(self.recipe, self.folder / "recipe.yaml")

    def _check_adapter(self) -> None:
        """Adds an adapter on chosen modules to a model without weights: their names are wrong for some models."""
        section, base = self.recipe.adapter, self.recipe.model
        chosen = section and (section.options or section.target_modules != "all-linear")
        if chosen and not self.args.reference_adapter and section.type != "shira":  # SHiRA's masks need the weights
            config = models.configuration(self.source, base)
            models.try_adapter(models.adapter_config(section), config, base.trust_remote_code)

    def _check_templates(self) -> None:
        """Tokenizes every row now, so that rows that the chat template refuses are reported before any long work."""
        faults = []
        for split in filter(self.examples, SPLITS):
            try:
                self.encoded(split, self.negatives(split).path.is_file())
            except UserError as error:
                faults.append(str(error))
        if faults:
            raise UserError("\n".join(faults))

    def _requirements(self) -> list[str]:
        args, has_adapter = self.args, self.recipe.adapter is not None
        try:
            rows = self.examples("train")
        except InvalidRows as error:  # problems of the other rows are reported together with these
            raise UserError("\n".join([str(error), *self._faults(error.valid)])) from error
        notes = requirements.check_steps(args, len(rows))
        requirements.check_precision(args, self.recipe.model.dtype)
        requirements.check_evaluations(args, len(self.examples("heldout")))
        if args.reference_adapter and not has_adapter:
            raise UserError(
                "training.reference_model: adapter:… trains a copy of that adapter, but `adapter: null` trains all "
                "parameters; change one of them"
            )
        requirements.check_adapter(args, self.objective, has_adapter)
        ready = self.ready_negatives()
        requirements.check_proposal(self.recipe.negatives, args, self.objective, rows, ready)
        notes += requirements.check_rows(RowFacts.of_examples(rows, ready), self.objective, args)
        if not self.objective.uses_negatives or ready:
            return notes
        if some := int((rows.negatives_N > 0).sum()):
            notes.append(
                f"{some} of {len(rows)} rows have negatives, which are not used: the base writes them for all rows "
                f"(negatives.source: {self.recipe.negatives.source})"
            )
        if self.recipe.negatives.keep == "wrong":
            _ = self.right_answer  # raises if answers cannot be checked
        return notes + requirements.check_generated(self.recipe.negatives.per_prompt, args, len(rows))

    def _faults(self, valid: Examples) -> list[str]:
        """The objective's requirements that the valid rows do not meet."""
        section = self.recipe.negatives
        ready = section.source == "data" or (section.source == "auto" and bool(valid.negatives_N.all()))
        try:
            if valid:
                requirements.check_rows(RowFacts.of_examples(valid, ready), self.objective, self.args)
        except UserError as error:
            return [str(error)]
        return []

    # ---- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def splits(self) -> Splits:
        """The rows, read and checked."""
        return load_splits(self.recipe.data, self.folder / "data")

    def examples(self, split: str) -> Examples:
        """The rows of "train" or "heldout"."""
        return getattr(self.splits, split)

    def ready_negatives(self, split: str = "train") -> bool:
        """Whether the rows have their own negatives, instead of the base writing them; perhaps only held-out rows."""
        source = self.recipe.negatives.source
        if source == "auto":
            return any(bool(self.examples(name).negatives_N.all()) for name in {"train", split})
        return source == "data"

    def negatives_wanted(self, split: str) -> int:
        """Negatives per prompt: for training enough for all visits, for held-out rows enough for one."""
        section = self.recipe.negatives
        if split == "heldout":
            return section.eval_per_prompt or self.args.negatives_per_step
        if not self.objective.uses_negatives:
            return 0
        return section.per_prompt or requirements.negatives_used(self.args, len(self.examples("train")))

    @cached_property
    def right_answer(self) -> Callable[[str, str], bool]:
        """The check of an answer, `check(answer, truth)`, from `evaluation.answer`, for `negatives.keep: wrong`.

        Raises:
            UserError: the training rows' answers cannot be checked.
        """
        section = self.recipe.evaluation
        kind = section.answer
        if kind == "auto":
            kind = answers.detect([truth_of(example) for example in self.examples("train")])
        if kind == "none":
            raise UserError(
                f"negatives.keep is wrong, but evaluation.answer is {section.answer}"
                + (", and not every row's answer is a number" if section.answer == "auto" else "")
                + "; wanted one of number, choice, regex, math, to tell right answers from wrong ones"
            )
        return answers.checker(kind, section.pattern)

    # ---- base -----------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> models.Source:
        """Where the base is loaded from."""
        return models.locate(self.recipe.model)

    @cached_property
    def tokenizer(self):
        """The base's tokenizer."""
        return models.load_tokenizer(self.source, self.recipe.model)

    def base(self):
        """A new copy of the base on its device."""
        say(
            f"loading {models.public_name(self.source, self.recipe.model)}"
            + (" in 4 bit (NF4)" if self.recipe.model.load_in_4bit else "")
            + (", dequantized" if self.recipe.model.dequantize else "")
        )
        return models.load_base(self.source, self.recipe.model)

    # ---- token ids ------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder with this run's template, end tokens and lengths, limited to the model's context."""
        args, context = self.args, models.context_length(self.source, self.recipe.model)
        ends = models.generation_end_ids(self.source)
        return Encoder(self.tokenizer, args.max_length, args.max_prompt_length, context, ends)

    def sampling_ids(self, example: Example) -> list[int]:
        """Ids of the prompt from which this example's negatives are sampled."""
        return sampling_ids(self.recipe.negatives, self.examples("train"), self.encoder, example)

    def encoded(self, split: str, with_negatives: bool = True) -> EncodedRows:
        """The encoded rows of a split, with their negatives joined by example_id."""
        ready = self.ready_negatives(split)
        generated = None
        if with_negatives and not ready and self.negatives_wanted(split):
            generated = _made(self.negatives(split), "generate").path
        prompts = None
        if self.args.reference_prompt != "training":
            shots_from = self.examples("train") if self.recipe.negatives.strategy == "few_shot" else ()
            prompts = partial(sampling_ids, self.recipe.negatives, shots_from)
        rows, self.encoder.truncation = prepare(
            self.folder / "data" / f"{split}_ids.arrow",
            identity.encoding(self, split, with_negatives),
            self.examples(split),
            Tokenizing(self.encoder, ready, prompts),
            generated,
            identity.encoding(self, split, with_negatives=False),
        )
        return rows

    @property
    def reference_from_file(self) -> bool:
        """Whether training takes its reference scores from the run folder."""
        return self.objective.uses_any_reference and self.args.reference == "precomputed"

    def with_reference(self, rows: EncodedRows) -> EncodedRows:
        """Training rows with the precomputed reference log-probabilities from the run folder.

        Raises:
            UserError: they are missing, or were scored on other negatives than those in the run folder.
        """
        product = _made(self.reference, "score")
        if product.facts().get("negatives") != self.negatives_content:
            raise UserError(
                f"{product.path} was scored on other negatives than those in {self.negatives('train').path}. Delete "
                f"{product.path} and {product.manifest} to score again."
            )
        names = [FIELDS[need] for need in sorted(self.objective.needs & REFERENCE_NEEDS)]
        scored = pq.read_table(product.path, columns=["example_id", *names])
        index = pc.index_in(rows.table["example_id"], value_set=scored["example_id"])
        return rows.with_columns(**{name: scored[name].take(index) for name in names})

    # ---- products ---------------------------------------------------------------------------------------------------

    def negatives(self, split: str) -> Product:
        """The negatives that the base writes for a split."""
        name = "negatives.parquet" if split == "train" else "heldout_negatives.parquet"
        return Product(self.folder / name, identity.negatives(self, split))

    @property
    def reference(self) -> Product:
        """The reference's log-probabilities of the training rows."""
        return Product(self.folder / "reference.parquet", identity.reference(self))

    @property
    def negatives_content(self) -> str | None:
        """A hash of the training negatives that the base wrote; None if the rows have their own."""
        return None if self.ready_negatives() else self.negatives("train").content()

    @property
    def training(self) -> Product:
        """The trained adapter (or the whole model)."""
        return Product(self.folder / ("adapter" if self.recipe.adapter else "model"), identity.training(self))

    @property
    def evaluation(self) -> Product:
        """The evaluation on the held-out rows."""
        return Product(self.folder / "evaluation.json", identity.evaluation(self))

    @property
    def base_evaluation(self) -> Product:
        """The base's part of the evaluation, which is the same for all runs with the same held-out rows."""
        return Product(self.folder / "base_evaluation.json", identity.base_evaluation(self))


def truth_of(example: Example) -> str:
    """What an answer is compared with: the row's bare answer if it has one, else its completion."""
    return example.answer or plain_text(example.completion)


def _made(product: Product, verb: str) -> Product:
    if not product.path.is_file():
        raise UserError(f"{product.path} is missing; run `lowdft {verb} RECIPE` first, or `lowdft run RECIPE`")
    return product
