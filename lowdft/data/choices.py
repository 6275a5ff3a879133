"""Multiple-choice rows: the right option is the completion, the other options are its negatives.

| | columns |
|---|---|
| question | question, question_stem, prompt, ctx, goal or query; or question: {stem, choices} (AI2's own files) |
| options | choices, options or endings: a list of texts, a list of {text, label}, or {text: […], label: […]} |
| right option | answerKey, answer_key, label, answer, correct or gold: index from 0, letter, label, or text |

A row that also has a completion, messages or another answer to train on is not read as multiple choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowdft.data.example import normal
from lowdft.data.layouts import BadRow, fitting_layouts, json_list, kind_of
from lowdft.data.read import REMOVE, cut

QUESTIONS = ("question", "question_stem", "prompt", "ctx", "goal", "query")
OPTIONS = ("choices", "options", "endings")
ANSWERS = ("answerKey", "answer_key", "label", "answer", "correct", "gold")
TRAINED_ELSEWHERE = ("completion", "messages", "conversations", "chosen", "real", "response", "output")


@dataclass
class Choice:
    """One row: the question, the right option and the wrong ones; options are (path, text)."""

    question_path: str
    question: object
    options_path: str
    right: tuple[str, str]
    wrong: list[tuple[str, str]]


def read_choice(view: dict, columns: dict[str, str]) -> Choice | None:
    """The row as multiple choice, or None if it has no options or has another answer to train on.

    Args:
        view: the row under lowdft's column names.
        columns: lowdft's name -> the user's column (`prompt`, `choices` and `answer` are used).

    Raises:
        BadRow: there are not at least two different options, or the right one is missing or ambiguous.
    """
    if any(view.get(name) is not None for name in TRAINED_ELSEWHERE):
        return None
    asked = "prompt" if "prompt" in columns else next((n for n in QUESTIONS if view.get(n) is not None), None)
    if asked is None:
        return None
    question, path = view[asked], columns.get(asked, asked)
    held = view
    if isinstance(question, dict) and "stem" in question:
        question, path, held = question["stem"], f"{path}.stem", {**view, **question}
    name = next((n for n in OPTIONS if isinstance(json_list(held.get(n)), (list, dict))), None)
    if name is None:
        return None
    options_path = columns.get(name, name) if held is view or name in view else f"{columns.get(asked, asked)}.{name}"
    key = columns.get("answer") or next((n for n in ANSWERS if n in view), None)
    if key is None:
        if fitting_layouts([n for n, value in view.items() if value is not None], ()):
            return None
        raise BadRow(
            options_path,
            f"are options, but no column says which is right; known names are {', '.join(ANSWERS)}. "
            "Map yours with data.columns: {answer: …}.",
        )
    texts, labels, paths = _options(json_list(held[name]), options_path)
    right = _right(view.get(key), key, texts, labels, options_path)
    options = list(zip(paths, texts, strict=True))
    return Choice(path, question, options_path, options.pop(right), options)


def _options(value: list | dict, path: str) -> tuple[list[str], list[str], list[str]]:
    """Texts, labels (empty if there are none) and paths of all options."""
    labels: list = []
    if isinstance(value, dict):
        texts, labels = json_list(value.get("text")), json_list(value.get("label")) or []
        if not isinstance(texts, list) or not isinstance(labels, list) or len(labels) not in (0, len(texts)):
            raise BadRow(path, f"is {kind_of(value)}; lists text and label of one length are needed. {REMOVE}")
        paths = [f"{path}.text[{i}]" for i in range(len(texts))]
    elif value and all(isinstance(one, dict) for one in value):
        texts, labels = [one.get("text") for one in value], [one.get("label") for one in value]
        paths = [f"{path}[{i}].text" for i in range(len(texts))]
    else:
        texts, paths = value, [f"{path}[{i}]" for i in range(len(value))]
    for one, text in zip(paths, texts, strict=True):
        if isinstance(text, bool) or not isinstance(text, (str, int, float)) or not str(text).strip():
            raise BadRow(one, f"is {kind_of(text)}; every option is a text. {REMOVE}")
    texts = [str(text).strip() for text in texts]
    if len(texts) < 2:
        found = f"{len(texts)} option{'' if len(texts) == 1 else 's'}"
        raise BadRow(path, f"has {found}; at least two are needed. {REMOVE}")
    seen: dict[str, str] = {}
    for one, text in zip(paths, texts, strict=True):
        if seen.setdefault(normal(text), one) != one:
            raise BadRow(one, f'is "{cut(text, 40)}", the same as {seen[normal(text)]}; options must differ. {REMOVE}')
    return texts, [str(label).strip() for label in labels if label is not None], paths


def _right(value: object, key: str, texts: list[str], labels: list[str], path: str) -> int:
    """The index of the right option.

    If the options have labels, the answer is a label or an option's text. Otherwise a number is an index from 0, and a
    string is an option's text, a letter or an index; it is an error if these readings give different options.
    """
    wanted = f"one of the labels {', '.join(labels)}" if labels else f"an index from 0 to {len(texts) - 1}"
    if value is None or value == "":
        raise BadRow(key, f"is {'null' if value is None else 'empty'}, so no option is the right one; {wanted}, "
                          f"or an option's text, is needed. {REMOVE}")  # fmt: skip
    if isinstance(value, bool) or not (isinstance(value, (str, int)) or (isinstance(value, float) and value % 1 == 0)):
        raise BadRow(key, f"is {kind_of(value)}; {wanted}, a letter, or an option's text is needed. {REMOVE}")
    text = value.strip() if isinstance(value, str) else str(int(value))
    readings = {"text": [i for i, one in enumerate(texts) if normal(one) == normal(text)]}
    if labels:
        readings["label"] = [i for i, label in enumerate(labels) if label == text]
    else:
        if re.fullmatch(r"[A-Za-z]", text):
            readings["letter"] = [i for i in [ord(text.upper()) - ord("A")] if i < len(texts)]
        if re.fullmatch(r"\d+", text):
            readings["index"] = [i for i in [int(text)] if i < len(texts)]
    found = {i: how for how, places in readings.items() for i in places}
    if not found:
        counted = " Are they counted from 1? Indices begin at 0." if text == str(len(texts)) and not labels else ""
        raise BadRow(key, f"is {cut(repr(value), 60)}, which names none of the {len(texts)} options in {path}; "
                          f"{wanted}, a letter, or an option's text is needed.{counted} {REMOVE}")  # fmt: skip
    if len(found) > 1:
        told = " and ".join(f"option {i} by its {how}" for i, how in found.items())
        raise BadRow(key, f"is {cut(repr(value), 60)}, which names {told}; write it so that only one reading is left.")
    return next(iter(found))
