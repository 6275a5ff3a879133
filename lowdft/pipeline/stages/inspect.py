"""inspect: shows rows as the model sees them, and a summary of the data; it loads only the tokenizer."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from lowdft.data.encode import Encoder
from lowdft.data.turns import DEFAULT_CHAT_TEMPLATE
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.text import printable

SHOWN_TOKENS = 400


def main(run: Run, row: int = 0) -> None:
    """Prints row `row` token by token (prompt, scored, special) and the summary of the training rows."""
    console = Console(highlight=False, soft_wrap=True)
    examples = run.examples("train")
    if not 0 <= row < len(examples):
        raise UserError(f"--row is {row}; wanted 0 to {len(examples) - 1}, the rows of the training data")
    rows = run.encoded("train", with_negatives=_negatives_at_hand(run))
    show_row(console, run, examples[row], rows[row])
    show_summary(console, run, rows)


def show_row(console: Console, run: Run, example, row: dict) -> None:
    """Prints one row: its prompt, the scored tokens, how it ends, and its negatives."""
    tokenizer, args = run.tokenizer, run.args
    console.print(f"[bold]{escape(example.source)}[/]  example_id {escape(example.example_id)}")
    if run.encoder.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE:
        console.print("this tokenizer has no chat template; the zephyr format is used instead")
    console.print("[dim]dim: prompt, not scored[/]  [green]green: scored[/]  [reverse]reverse: special token[/]\n")
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    console.print(f"prompt, {len(prompt)} tokens, {_begins(tokenizer, prompt)}")
    console.print(_colored(tokenizer, prompt, "dim"))
    console.print(f"\ncompletion, {len(completion)} scored tokens, {_ends(run.encoder, completion)}")
    console.print(_colored(tokenizer, completion, "green"))
    for k, ids in enumerate(row["negative_ids"]):
        visit = k // args.negatives_per_step
        console.print(f"\nnegative {k} (visit {visit}), {len(ids)} scored tokens, {_ends(run.encoder, ids)}")
        console.print(_colored(tokenizer, ids, "red"))
    if not run.ready_negatives():
        asked = run.sampling_ids(example)
        console.print(f"\nnegatives are sampled from ({run.recipe.negatives.strategy}, {len(asked)} tokens)")
        console.print(_colored(tokenizer, asked, "dim"))


def show_summary(console: Console, run: Run, rows: list[dict]) -> None:
    """Prints lengths, duplicate rows, and negatives equal to the completion, over all training rows."""
    table = Table(title=f"{len(rows)} training rows (layout {run.splits.layout})", title_justify="left")
    for column in ("tokens", "shortest", "median", "longest"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    lengths = {
        "prompt": [len(r["prompt_ids"]) for r in rows],
        "completion": [len(r["completion_ids"]) for r in rows],
        "negative": [len(ids) for r in rows for ids in r["negative_ids"]],
    }
    for name, values in lengths.items():
        if values:
            ordered = sorted(values)
            table.add_row(name, str(ordered[0]), str(ordered[len(ordered) // 2]), str(ordered[-1]))
    console.print()
    console.print(table)
    repeats = Counter((tuple(r["prompt_ids"]), tuple(r["completion_ids"])) for r in rows)
    equal = sum(ids == r["completion_ids"] for r in rows for ids in r["negative_ids"])
    console.print(f"duplicate rows: {len(rows) - len(repeats)}; negatives equal to the completion: {equal}")
    cut = run.encoder.cuts()
    console.print(cut or "nothing is cut to length")


def escape(text: str) -> str:
    """Text from the data or the tokenizer, safe to print."""
    return escape_markup(printable(text))


def _negatives_at_hand(run: Run) -> bool:
    return run.ready_negatives() or run.negatives("train").path.is_file()


def _colored(tokenizer, ids: list[int], style: str) -> str:
    special = set(tokenizer.all_special_ids)
    pieces = []
    for token in ids[:SHOWN_TOKENS]:
        text = escape(tokenizer.decode([token])).replace("\n", "↵\n")
        pieces.append(f"[reverse {style}]{text}[/]" if token in special else f"[{style}]{text}[/]")
    more = len(ids) - SHOWN_TOKENS
    return "".join(pieces) + (f" … and {more} more" if more > 0 else "")


def _begins(tokenizer, ids: list[int]) -> str:
    bos = tokenizer.bos_token_id
    return "begins with BOS" if bos is not None and ids and ids[0] == bos else "no BOS"


def _ends(encoder: Encoder, ids: list[int]) -> str:
    if ids and ids[-1] in encoder.end_ids:
        return f"ends with {escape(encoder.tokenizer.decode([ids[-1]]))}"
    return "no end token (cut to length)"
