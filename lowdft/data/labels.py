"""Classification rows: the completion is one of a fixed set of labels, and the other labels are its negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowdft.data.example import Example, Message, normal
from lowdft.data.prompting import plain_text
from lowdft.data.read import cut
from lowdft.errors import UserError

MOST = 20  # `auto` accepts at most this many labels


def find_labels(examples: Sequence[Example]) -> list[str]:
    """The different completions, sorted: the labels of `data.labels: auto`.

    Raises:
        UserError: there is only one, there are more than 20, or they occur less than twice on average.
    """
    found = sorted({normal(plain_text(example.completion)) for example in examples})
    if not 2 <= len(found) <= min(MOST, len(examples) // 2):
        raise UserError(
            f"data.labels is auto, but the {len(examples)} training rows have {len(found)} different completions "
            f"({cut(', '.join(found))}); wanted 2 to {MOST}, and on average at least two rows for each. List the "
            "labels, or remove data.labels."
        )
    return found


def with_labels(examples: Sequence[Example], labels: Sequence[object]) -> list[Example]:
    """The examples with the other labels as negatives, in the completion's form.

    Raises:
        UserError: a completion is not one of the labels, or a row has its own negatives; names the rows.
    """
    labels = [normal(str(label)) for label in labels]
    own = [example.source for example in examples if example.negatives]
    if own:
        raise UserError(
            f"{own[0]}: the row has its own negatives, but data.labels gives it others ({len(own)} such rows); "
            "wanted one of the two. Remove data.labels, or remove the rows' negatives."
        )
    strange = [example for example in examples if normal(plain_text(example.completion)) not in labels]
    if strange:
        told = ", ".join(f"{e.source} ({cut(plain_text(e.completion), 40)!r})" for e in strange[:3])
        raise UserError(
            f"{len(strange)} rows have a completion that is not in data.labels ({cut(', '.join(labels))}): {told}. "
            "Add the label, or correct these rows."
        )
    return [replace(example, negatives=_others(example, labels)) for example in examples]


def _others(example: Example, labels: Sequence[str]) -> list[str | list[Message]]:
    written = plain_text(example.completion)
    space = written[: len(written) - len(written.lstrip())]
    others = [space + label for label in labels if label != normal(written)]
    if isinstance(example.completion, str):
        return others
    return [[{**example.completion[0], "content": other}] for other in others]
