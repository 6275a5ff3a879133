"""init: writes a first recipe with comments, from a model and a file of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowdft.config.recipe import load_recipe, training_config
from lowdft.data import Loaded, load_examples
from lowdft.data.prompting import plain_text
from lowdft.errors import UserError
from lowdft.evaluation import answers
from lowdft.files import write_text
from lowdft.text import printable

CHARACTERS_PER_TOKEN = 3.0  # a low estimate for English text, so that limits on lengths are generous
TEMPLATE = """\
# Written by `lowdft init`. Every key: docs, "Recipe reference". Check it with `lowdft inspect` and `lowdft plan`.
output_dir: {output_dir}
model:
  name_or_path: {model}
  load_in_4bit: {load_in_4bit}  # NF4; with false the base needs four times the memory
data:
  train: {data}  # {rows} rows, layout {layout}
  eval_rows: {eval_rows}  # the last rows of the file, held out for evaluation
{negatives}training:
  objective: {objective}  # {why}
  negatives_per_step: {count}
  num_train_epochs: 2
  learning_rate: 2e-4  # LoRA; about 1e-5 with `adapter: null`
  per_device_train_batch_size: {batch}  # prompts per optimizer step; memory depends on tokens_per_pass instead
  max_prompt_length: {max_prompt_length}  # the longest prompt has about {longest_prompt} tokens
  max_length: {max_length}
  gradient_checkpointing: {checkpointing}
evaluation:
  answer: {answer}  # {answer_note}
"""


@dataclass(frozen=True)
class Seen:
    """Facts about the rows: `negatives` is the smallest number in any row; lengths are rough numbers of tokens."""

    rows: int
    layout: str
    negatives: int
    longest_prompt: int
    longest_completion: int
    answer: str


def main(model: str, data: str, output: str, gpu: float | None = None) -> None:
    """Writes a recipe for `model` and `data` to the file `output`.

    Args:
        gpu: memory of the GPU in GB; gradient checkpointing is switched on if the base needs it.

    Raises:
        UserError: the file already exists, or the rows cannot be read.
    """
    if Path(output).exists():
        raise UserError(f"{output}: this file already exists; give another name with --output, or delete it")
    loaded = load_examples(data)
    for note in [*loaded.notes, *(f"warning: {w}" for w in loaded.warnings)]:
        print(printable(f"{data}: {note}"))
    seen = look(loaded)
    write_text(output, recipe_text(model, data, Path(output).stem, seen, gpu))
    training_config(load_recipe(output))  # check that it is a valid recipe
    print(printable(f"{output}: written. Next: lowdft inspect {output}; lowdft plan {output}; lowdft run {output}"))


def look(loaded: Loaded) -> Seen:
    """Collects the facts on which the recipe depends."""
    examples = loaded.examples
    truths = [e.answer or plain_text(e.completion) for e in examples]
    return Seen(
        rows=len(examples),
        layout=loaded.layout,
        negatives=min(len(e.negatives) for e in examples),
        longest_prompt=_tokens(plain_text(e.prompt) for e in examples),
        longest_completion=_tokens(
            text for e in examples for text in (plain_text(e.completion), *map(plain_text, e.negatives))
        ),
        answer=answers.detect(truths),
    )


def recipe_text(model: str, data: str, name: str, seen: Seen, gpu: float | None) -> str:
    """The recipe as commented YAML."""
    own = seen.negatives > 0
    objective, count, why = _objective(seen)
    checked = seen.answer != "none"
    prompt, completion = _round_up(seen.longest_prompt + 32), _round_up(seen.longest_completion + 8)
    written = f"""\
negatives:
  max_new_tokens: {min(completion, 512)}
  strategy: direct  # plain samples rarely help; recipes/misconceptions.yaml shows the base what people get wrong
"""
    return TEMPLATE.format(
        output_dir=f"runs/{name}",
        model=model,
        load_in_4bit="true",
        data=data,
        rows=seen.rows,
        layout=seen.layout,
        eval_rows=max(1, min(200, seen.rows // 10)),
        negatives="" if own else written,
        objective=objective,
        why=why,
        count=count,
        batch=min(16, max(1, seen.rows // 8)),
        longest_prompt=seen.longest_prompt,
        max_prompt_length=min(prompt, 2048),
        max_length=min(prompt + completion, 4096),
        checkpointing="true" if gpu is not None and gpu <= 24 else "false",
        answer=seen.answer,
        answer_note="greedy answers are compared with the completions" if checked else "open answers are not checked",
    )


def _objective(seen: Seen) -> tuple[str, int, str]:
    """The objective for such rows, its negatives per step, and why."""
    if seen.layout == "choices":
        chosen = "most accurate for choosing"
        return "dft", 1, f"{chosen}; listwise (negatives_per_step: {seen.negatives}) keeps the right options likely"
    if seen.negatives:
        why = "compares the completion with the negatives in your rows; sft is the baseline to compare with"
        return "listwise", min(seen.negatives, 7), why
    return "dft", 2, "the paper's; `lowdft probe` estimates whether negatives will help; sft is the baseline"


def _tokens(texts) -> int:
    return round(max((len(text) for text in texts), default=0) / CHARACTERS_PER_TOKEN)


def _round_up(n: int, to: int = 64) -> int:
    return -(-n // to) * to
