"""One run: a recipe, its data, its base and its folder; and what each product of the folder is made from.

Everything is found when it is first asked for: what needs no model is checked before one is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq

from lowdft import models, objectives
from lowdft.config.recipe import Recipe, save_recipe, training_config
from lowdft.data import Example, Loaded, load_examples, overlap
from lowdft.data.encode import Encoder, Truncation
from lowdft.data.labels import find_labels, with_labels
from lowdft.data.load import fingerprint
from lowdft.data.prompting import choose_shots, fold_system, plain_text, sampling_prompt
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.evaluation import answers
from lowdft.models.reference import FIELDS, REFERENCE_NEEDS
from lowdft.pipeline.artifact import Product
from lowdft.training.training_set import check_adapter, negatives_least, negatives_needed

SPLITS = ("train", "heldout")
# training settings that change neither the numbers nor what is kept of them
INCIDENTAL = {
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "eval_strategy",
    "eval_steps",
    "log_level",
}


class Run:
    """The recipe at work. Attributes are cached; `say` prints one line for people on standard output.

    Raises:
        UserError: when the recipe, the data or the run folder do not fit together, before any model is loaded.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.args = training_config(recipe)
        self.objective = objectives.get(self.args.objective)

    def check(self) -> None:
        """Every check that needs no model, also of what the run folder holds; then writes the resolved recipe there."""
        self._check_training()
        for product in (self.negatives("train"), self.negatives("heldout"), self.reference, self.training):
            if product.manifest.is_file():
                product.is_done()
        if collectives.rank() == 0:
            save_recipe(self.recipe, self.folder / "recipe.yaml")

    # ---- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def _data(self) -> tuple[list[Example], list[Example], str]:
        section = self.recipe.data
        loaded = self._load(section.train, section.split, section.revision)
        rows = loaded.examples
        held: list[Example] = []
        if section.eval:
            revision = section.eval_revision or section.revision
            held = self._load(section.eval, section.eval_split, revision).examples[: section.eval_rows]
        elif section.eval_rows:
            if section.eval_rows >= len(rows):
                raise UserError(
                    f"data.eval_rows is {section.eval_rows}, but data.train has {len(rows)} rows; wanted fewer"
                )
            rows, held = rows[: -section.eval_rows], rows[-section.eval_rows :]
        if section.tune_rows:
            rows, held = rows[: -section.tune_rows], rows[-section.tune_rows :]
        rows = rows[: section.train_rows]
        if section.labels is not None:
            labels = find_labels(rows) if section.labels == "auto" else section.labels
            say(f"labels: {', '.join(map(str, labels))}")
            rows, held = with_labels(rows, labels), with_labels(held, labels)
        for warning in overlap(rows, held):
            say(f"warning: {warning}")
        return rows, held, loaded.layout

    def _load(self, source: str, split: str, revision: str | None) -> Loaded:
        section = self.recipe.data
        loaded = load_examples(
            source,
            split=split,
            revision=revision,
            columns=dict(section.columns),
            prompt_style=section.prompt_style,
            system_prompt=section.system_prompt,
            prompt_template=section.prompt_template,
            skip_invalid=section.skip_invalid,
        )
        for note in [*loaded.notes, *(f"warning: {w}" for w in loaded.warnings)]:
            say(f"{source}: {note}")
        return loaded

    def examples(self, split: str) -> list[Example]:
        """The rows of "train" or "heldout"."""
        return self._data[SPLITS.index(split)]

    @property
    def layout(self) -> str:
        """How the rows of the training data are laid out."""
        return self._data[2]

    def ready_negatives(self, split: str = "train") -> bool:
        """Do the rows bring their own negatives, or does the base write them? Held-out rows may do so alone."""
        source = self.recipe.negatives.source
        if source == "auto":
            return any(all(e.negatives for e in self.examples(name)) for name in ("train", split))
        return source == "data"

    def negatives_wanted(self, split: str) -> int:
        """Negatives of one prompt: for training those of all its visits, for held-out rows those of one."""
        section = self.recipe.negatives
        if split == "heldout":
            return section.eval_per_prompt or self.args.negatives_per_step
        if not self.objective.uses_negatives:
            return 0
        return section.per_prompt or negatives_needed(self.args, len(self.examples("train")))

    def _check_training(self) -> None:
        args, rows = self.args, self.examples("train")
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.dataloader_drop_last and len(rows) < per_step:
            raise UserError(
                f"{len(rows)} rows make no step of {per_step} with training.dataloader_drop_last; lower the batch"
            )
        if len(rows) < per_step:
            say(f"warning: {len(rows)} rows are fewer than one step of {per_step}; every epoch is one smaller step")
        if self.recipe.adapter is None:
            check_adapter(args, self.objective)
        if args.reference_adapter and self.recipe.adapter is None:
            raise UserError(
                "training.reference_model: adapter:… trains a copy of it; with `adapter: null` there is none"
            )
        if self.objective.uses_aligned:
            self._check_aligned()
        if self.objective.uses_negatives:
            self._check_negatives()

    def _check_aligned(self) -> None:
        lacking = [example.source for example in self.examples("train") if example.aligned_logps is None]
        if lacking:
            raise UserError(
                f"{len(lacking)} rows have no `aligned_logps` (first: {', '.join(lacking[:3])}), which "
                f"training.objective {self.objective.name} needs: the mean log-probability a token of the completion "
                "under aligned models, scored beforehand. Add that column, or choose another objective."
            )

    @cached_property
    def right_answer(self) -> Callable[[str, str], bool]:
        """How an answer is checked, `check(answer, truth)`, as `evaluation.answer` says, for `negatives.keep: wrong`.

        Raises:
            UserError: the training rows' answers cannot be checked.
        """
        section = self.recipe.evaluation
        truths = [truth_of(example) for example in self.examples("train")]
        kind = answers.detect(truths) if section.answer == "auto" else section.answer
        if kind == "none":
            raise UserError(
                f"negatives.keep is wrong, but evaluation.answer is {section.answer}"
                + (", and not every row's answer is a number" if section.answer == "auto" else "")
                + "; wanted one of number, choice, regex, math, which tells right answers from wrong ones"
            )
        return answers.checker(kind, section.pattern)

    def _check_negatives(self) -> None:
        args, rows, per_prompt = self.args, self.examples("train"), self.recipe.negatives.per_prompt
        if not self.ready_negatives():
            if self.recipe.negatives.keep == "wrong":
                _ = self.right_answer  # raises where answers cannot be checked
            needed = negatives_needed(args, len(rows))
            if per_prompt is not None and per_prompt < needed:
                raise UserError(
                    f"negatives.per_prompt is {per_prompt}; training uses {needed} a prompt "
                    f"({args.num_train_epochs:g} epochs of {args.negatives_per_step})"
                )
            return
        needed = negatives_least(args, len(rows), self.objective)
        short = [example.source for example in rows if len(example.negatives) < needed]
        if short:
            epochs = f"{args.num_train_epochs:g} epochs of " if self.objective.uses_log_u else ""
            raise UserError(
                f"{len(short)} rows have fewer than the {needed} negatives that {epochs}"
                f"training.negatives_per_step={args.negatives_per_step} use (first: {', '.join(short[:3])}). "
                "Lower it (or the epochs), or set negatives.source: generate."
            )

    # ---- base -----------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> models.Source:
        """Where the base is."""
        return models.locate(self.recipe.model)

    @cached_property
    def tokenizer(self):
        """The base's tokenizer."""
        return models.load_tokenizer(self.source, self.recipe.model)

    def base(self):
        """A fresh copy of the base on its device."""
        say(
            f"loading {models.public_name(self.source, self.recipe.model)}"
            + (" in 4 bit (NF4)" if self.recipe.model.load_in_4bit else "")
        )
        return models.load_base(self.source, self.recipe.model)

    # ---- token ids ------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """Rows to ids with this run's template and lengths, never longer than the model's context."""
        length, context = self.args.max_length, models.context_length(self.source, self.recipe.model)
        if context and (length is None or length > context):
            say(f"training.max_length is {length}; this model's context of {context} tokens is taken")
            length = context
        return Encoder(self.tokenizer, length, self.args.max_prompt_length)

    def sampling_ids(self, example: Example) -> list[int]:
        """Ids of the prompt that this example's negatives are sampled from."""
        section, shots = self.recipe.negatives, []
        if section.strategy == "few_shot":
            shots = choose_shots(example, self.examples("train"), section.shots, section.seed)
        prompt = sampling_prompt(example, section.strategy, section.system_prompt, section.template, shots)
        try:
            return self.encoder.prompt(prompt, example.tools)
        except UserError:
            if isinstance(prompt, list) and prompt[0]["role"] == "system":
                return self.encoder.prompt(fold_system(prompt), example.tools)
            raise

    def encoded(self, split: str, with_negatives: bool = True) -> list[dict]:
        """The rows of a split as training and evaluation take them, with their negatives, joined by example_id."""
        self.encoder.truncation = Truncation()
        generated = {}
        if with_negatives and not self.ready_negatives(split) and self.negatives_wanted(split):
            generated = _column(self.negatives(split).path, "negative_ids")
        rows = []
        for example in self.examples(split):
            row = {
                "example_id": example.example_id,
                "prompt": example.prompt,
                "completion": example.completion,
                "tools": example.tools,
                "negatives": example.negatives if self.ready_negatives(split) else [],
                "aligned_logps": example.aligned_logps,
            }
            try:
                encoded = self.encoder.row(row)
            except UserError as error:
                raise UserError(f"{example.source}: {error}") from error
            if generated:
                prompt_ids = encoded["prompt_ids"]
                encoded["negative_ids"] = [
                    self.encoder.fit(prompt_ids, ids, "negatives") for ids in generated[example.example_id]
                ]
            if self.args.reference_prompt != "training":
                encoded["sampling_prompt_ids"] = self.sampling_ids(example)
            rows.append(encoded)
        return rows

    @property
    def reference_from_file(self) -> bool:
        """Does training take its reference from the run folder?"""
        return self.objective.uses_any_reference and self.args.reference == "precomputed"

    def with_reference(self, rows: list[dict]) -> list[dict]:
        """Training rows with the precomputed reference log-probabilities of the run folder."""
        for name in (FIELDS[need] for need in sorted(self.objective.needs & REFERENCE_NEEDS)):
            table = _column(self.reference.path, name)
            rows = [{**row, name: table[row["example_id"]]} for row in rows]
        return rows

    # ---- products: what each is made from ---------------------------------------------------------------------------

    @cached_property
    def _made_from_base(self) -> dict:
        return models.made_from(self.source, self.recipe.model, self.tokenizer)

    def _made_from_data(self, split: str) -> dict:
        lengths = {"max_length": self.encoder.max_length, "max_prompt_length": self.encoder.max_prompt_length}
        return {"data": fingerprint(self.examples(split))} | lengths

    def negatives(self, split: str) -> Product:
        """The negatives that the base writes for a split."""
        section = dataclasses.asdict(self.recipe.negatives)
        kept = {
            k: v
            for k, v in section.items()
            if k not in ("source", "push", "private", "per_prompt", "eval_per_prompt", "batch_size")
        }
        if section["strategy"] == "few_shot":
            kept["shots_from"] = fingerprint(self.examples("train"))
        else:
            del kept["shots"]
        if section["keep"] == "all":
            del kept["keep"]
        else:
            kept |= {"answer": self.recipe.evaluation.answer, "pattern": self.recipe.evaluation.pattern}
        kept["adapter"] = None  # held-out negatives are always the base's, so that runs and rounds compare
        if split == "train" and section["adapter"]:
            kept["adapter"] = adapter_identity("negatives.adapter", section["adapter"])
        name = "negatives.parquet" if split == "train" else "heldout_negatives.parquet"
        made_from = (
            self._made_from_base | self._made_from_data(split) | kept | {"per_prompt": self.negatives_wanted(split)}
        )
        return Product(self.folder / name, made_from)

    @property
    def reference(self) -> Product:
        """The base's log-probabilities of the training negatives."""
        made_from = self._made_from_negatives("train") | {
            "reference_prompt": self.args.reference_prompt,
            "negatives_scored": self.args.negatives_scored,
            "scored": sorted(self.objective.needs & REFERENCE_NEEDS),
            "reference_model": self._reference_model,
        }
        return Product(self.folder / "reference.parquet", made_from)

    @property
    def _reference_model(self) -> str:
        """ "base", or the reference adapter named by its content."""
        path = self.args.reference_adapter
        return "base" if path is None else adapter_identity("training.reference_model", path)

    @property
    def training(self) -> Product:
        """The trained adapter (or the whole model)."""
        training = {k: v for k, v in self.recipe.training.items() if k not in INCIDENTAL}
        adapter = dataclasses.asdict(self.recipe.adapter) if self.recipe.adapter else None
        training["reference_model"] = self._reference_model
        made_from = self._made_from_negatives("train") | {"adapter": adapter, "training": training}
        return Product(self.folder / ("adapter" if self.recipe.adapter else "model"), made_from)

    @property
    def evaluation(self) -> Product:
        """What was measured on the held-out rows."""
        compared = {"compare": self.recipe.evaluation.compare}
        made_from = self.base_evaluation.made_from | compared | {"trained": self.training.made_from}
        return Product(self.folder / "evaluation.json", made_from)

    @property
    def base_evaluation(self) -> Product:
        """What was measured of the base alone: the same for every training on the same held-out rows."""
        section = self.recipe.evaluation
        how = {name: getattr(section, name) for name in ("answer", "pattern", "max_new_tokens")}
        return Product(self.folder / "base_evaluation.json", self._made_from_negatives("heldout") | how)

    def _made_from_negatives(self, split: str) -> dict:
        if self.ready_negatives(split) or not self.negatives_wanted(split):
            return self._made_from_base | self._made_from_data(split)
        return self.negatives(split).made_from


def truth_of(example: Example) -> str:
    """What an answer is checked against: the row's bare answer where it has one, else its completion."""
    return example.answer or plain_text(example.completion)


def adapter_identity(key: str, path: str) -> str:
    """Names a trained adapter by its content; UserError when none stands at `path`."""
    return "adapter " + hashlib.sha256(models.require_adapter(path, key).read_bytes()).hexdigest()[:16]


def say(line: str) -> None:
    """One line for people, on standard output; of several ranks the first speaks."""
    if collectives.rank() == 0:
        print(line, flush=True)


def _column(path: Path, name: str) -> dict[str, list]:
    if not path.is_file():
        step = "generate" if "negatives" in path.name else "score"
        raise UserError(f"{path}: is not there yet; run `lowdft {step} RECIPE` first, or `lowdft run RECIPE`")
    table = pq.read_table(path, columns=["example_id", name])
    return dict(zip(table["example_id"].to_pylist(), table[name].to_pylist(), strict=True))
