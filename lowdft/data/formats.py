"""The layouts of rows, and how each becomes a prompt, one answer to train on and its negatives.

In a conversation the last assistant turn is trained on (`Row.trained_turn` names it), and everything before it is the
prompt. Every turn knows its place in the user's columns, for messages such as "conversations[0].value is missing".

| columns | prompt | completion |
|---|---|---|
| messages, or conversations (ShareGPT) | all turns but the last | the last turn |
| prompt + completion | prompt, text or messages | completion, text or messages |
| prompt + chosen, prompt + real | prompt | chosen or real: an answer, or the whole conversation |
| chosen, or real, alone | all turns but the last | the last turn |
| question + answer, prompt + answer | question or prompt | answer |
| query + response (MetaMathQA) | query | response |
| instruction (+ input) + output (Alpaca) | instruction, blank line, input | output |
| question + choices + answer, label or answerKey | question | the right option; see `choices` |

Other columns: negatives (a list), rejected, generated, rejected_0… and generated_0… are negatives; system is the system
message; tools; example_id or id; answer, if it is not the completion, is the bare answer; aligned_logps is a number.
"""

from __future__ import annotations

import math
import re

from lowdft.data.choices import Choice, read_choice
from lowdft.data.example import Row, Turn, contents
from lowdft.data.layouts import (
    CONVERSATIONS,
    LAYOUTS,
    NEGATIVES,
    BadRow,
    detect_layout,
    fitting_layouts,
    json_list,
    kind_of,
)
from lowdft.data.read import REMOVE, Record, cut

SPEAKERS = {
    "role": {name: name for name in ("system", "user", "assistant", "tool", "function")},
    "from": {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
             "tool": "tool", "function": "function"},
}  # fmt: skip
PRINTED = re.compile(r"\s*\[\s*['\"{].*['\"}]\s*\]\s*", re.DOTALL)  # a list as Python or pandas prints it
PRINTED_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content)'\s*:")


def to_row(record: Record, columns: dict[str, str] | None = None, expected: str | None = None) -> Row:
    """A record as a `Row`. `columns` maps lowdft's column names to the user's.

    Raises:
        BadRow: no layout fits, two layouts disagree, or a part does not have the form that the layout needs.
    """
    columns = columns or {}
    view = _view(record.columns, columns)
    choice = read_choice(view, columns)
    layout, prompt, completion = _of_choice(choice) if choice else _of_layout(view, columns, expected)
    unpaired = layout == "prompt+completion" and "label" not in columns.values()
    if unpaired and str(view.get("label")).lower() == "false":
        raise BadRow(
            "label",
            "is false, so this completion is a bad answer (TRL's unpaired preferences), but a completion is trained on "
            "as a good one. Add it to the negatives of a row with the same prompt and a good answer. If the column "
            f"means something else, remove it, or set data.columns: {{answer: label}}. {REMOVE}",
        )
    system = view.get("system")
    if system not in (None, "") and all(turn.text != system for turn in prompt if turn.role == "system"):
        prompt = [Turn({"role": "system", "content": system}, columns.get("system", "system")), *prompt]
    if choice:
        negatives, used = [_turns(text, path, "assistant") for path, text in choice.wrong], [choice.options_path]
        answer = choice.right[1]
    else:
        negatives, used = _negatives(view, columns, prompt)
        own_answer = "answer" if "answer" in view and "answer" not in LAYOUTS[layout] else ""
        answer = _plain(record.columns, columns.get("answer") or own_answer, strict="answer" in columns)
    id_column = columns.get("example_id") or ("example_id" if view.get("example_id") is not None else "id")
    return Row(
        record.where, layout, prompt, completion, negatives, used,
        tools=_tools(view.get("tools"), columns.get("tools", "tools")),
        answer=answer,
        given_id=_plain(record.columns, id_column, strict=True),
        aligned_logps=_mean_logp(view.get("aligned_logps"), columns.get("aligned_logps", "aligned_logps")),
    )  # fmt: skip


def _of_choice(choice: Choice) -> tuple[str, list[Turn], list[Turn]]:
    path, text = choice.right
    return "choices", _turns(choice.question, choice.question_path, "user"), _turns(text, path, "assistant")


def _of_layout(view: dict, columns: dict[str, str], expected: str | None) -> tuple[str, list[Turn], list[Turn]]:
    """Layout, prompt and completion; if other layouts fit too, they must give the same result."""
    mapped = [ours for ours in columns if ours in view]
    not_null = [name for name, value in view.items() if value is not None]
    fitting = fitting_layouts(not_null, mapped) or [detect_layout(view, mapped, expected)]
    prompt, completion = _split(fitting[0], view, columns)
    for other in fitting[1:]:
        if contents(sum(_split(other, view, columns), [])) != contents(prompt + completion):
            raise BadRow(
                "",
                f"fits two layouts that disagree: {fitting[0]} and {other}; one is wanted. Remove a "
                "column, or say which with data.columns.",
            )
    return fitting[0], prompt, completion


def _view(row: dict, columns: dict[str, str]) -> dict:
    """The row under lowdft's column names; a mapped column replaces one that already has that name."""
    renames = {ours: theirs for ours, theirs in columns.items() if ours not in ("answer", "example_id")}
    for ours, theirs in renames.items():
        if theirs not in row and ours in ("prompt", "completion", "messages"):
            raise BadRow(
                theirs,
                f"is missing ({cut(', '.join(map(str, row)))} found); data.columns uses it as {ours}. {REMOVE}",
            )
    view = {name: value for name, value in row.items() if name not in renames.values()}
    return view | {ours: row.get(theirs) for ours, theirs in renames.items()}


def _split(layout: str, view: dict, columns: dict[str, str]) -> tuple[list[Turn], list[Turn]]:
    """Prompt and completion of one layout."""
    if layout in CONVERSATIONS:
        path = columns.get(layout, layout)
        turns = _conversation(view[layout], path, sharegpt=layout == "conversations")
        return turns[:-1], turns[-1:]
    asked, answered = (columns.get(name, name) for name in LAYOUTS[layout])
    prompt = _turns(view[LAYOUTS[layout][0]], asked, "user")
    extra = view.get("input") if layout == "instruction+output" else None
    if isinstance(extra, str) and extra.strip() and isinstance(prompt[0].text, str):
        prompt[0].message["content"] += "\n\n" + extra
    elif extra is not None and not isinstance(extra, str):
        raise BadRow("input", f"is {kind_of(extra)}; text is needed. Write it as a string.")
    answer = _turns(view[LAYOUTS[layout][1]], answered, "assistant")
    before = answer[:-1]
    if any(turn.role == "user" for turn in before):  # the whole conversation over again
        if contents(before) != contents(prompt):
            raise BadRow(answered, f"has a different prompt than {asked}; give it the same. {REMOVE}")
        prompt = max(before, prompt, key=len)
    else:
        prompt = prompt + before
    return prompt, answer[-1:]


def _turns(value: object, path: str, role: str) -> list[Turn]:
    """Turns from a text (one turn of `role`), a message or a list of messages, also as JSON (CSV)."""
    held = json_list(value)
    if isinstance(held, list) and held and all(isinstance(one, dict) and "role" in one for one in held):
        value = held
    elif isinstance(value, str) and PRINTED_MESSAGES.match(value):
        raise BadRow(path, f"is a list of messages as Python prints it ({cut(value, 40)}); JSON is needed. Write it "
                           "with json.dumps, or save the rows as JSON lines or parquet.")  # fmt: skip
    if isinstance(value, dict):
        return [_turn(value, path, sharegpt=False)]
    if isinstance(value, list) and (not value or isinstance(value[0], dict)):
        return _conversation(value, path)
    return [Turn({"role": role, "content": value}, path)]


def _conversation(value: object, path: str, sharegpt: bool = False) -> list[Turn]:
    value = json_list(value)
    wanted = "a list of {from, value}" if sharegpt else "a list of {role, content}"
    if not isinstance(value, list):
        raise BadRow(path, f"is {kind_of(value)}; {wanted} is needed. {REMOVE}")
    if not value:
        raise BadRow(path, f"is an empty list; {wanted} that ends in an answer is needed. {REMOVE}")
    return [_turn(message, f"{path}[{i}]", sharegpt) for i, message in enumerate(value)]


def _turn(message: object, path: str, sharegpt: bool) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(path, f"is {kind_of(message)}; an object with a role and a content is needed. {REMOVE}")
    if not {"role", "content"} & set(message):
        sharegpt = sharegpt or bool({"from", "value"} & set(message))
    else:
        sharegpt = False
    keys = ("from", "value") if sharegpt else ("role", "content")
    canonical = {name: message[key] for name, key in zip(("role", "content"), keys, strict=True) if key in message}
    if isinstance(canonical.get("role"), str):
        canonical["role"] = SPEAKERS[keys[0]].get(canonical["role"], canonical["role"])
    others = {key: value for key, value in message.items() if key not in keys and value is not None}
    return Turn(canonical | others, path, keys)


def _negatives(view: dict, columns: dict[str, str], prompt: list[Turn]) -> tuple[list[list[Turn]], list[str]]:
    names = [name for name in view if NEGATIVES.fullmatch(str(name))]
    names.sort(key=lambda name: (name != "negatives", name.split("_")[0], int(name.partition("_")[2] or -1)))
    negatives, used = [], []
    for name in names:
        path = columns.get(name, name)
        for item_path, item in _items(name, view[name], path):
            turns = _turns(item, item_path, "assistant")
            before = contents(turns[:-1])
            if before and before != contents(prompt)[-len(before) :]:
                raise BadRow(item_path, f"has a different prompt than the completion; give it the same. {REMOVE}")
            negatives.append(turns[-1:])
        if view[name] is not None:
            used.append(path)
    return negatives, used


def _items(name: str, value: object, path: str) -> list[tuple[str, object]]:
    """The negatives of one column, each with its path. A conversation is one negative, another list is several."""
    if name == "negatives":
        value = json_list(value)
        if isinstance(value, str) and (path == name or PRINTED.fullmatch(value)):
            raise BadRow(
                path,
                f"is {kind_of(value)}; a list of answers is needed. Write it as a list (in CSV as JSON), or name the "
                "column rejected.",
            )
    if value is None or not isinstance(value, list):
        return [] if value is None else [(path, value)]
    is_messages = bool(value) and all(isinstance(item, dict) for item in value)
    if is_messages and (name != "negatives" or any("user" in (m.get("role"), m.get("from")) for m in value)):
        return [(path, value)]
    return [(f"{path}[{i}]", item) for i, item in enumerate(value)]


def _tools(value: object, path: str) -> list[dict] | None:
    value = json_list(value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(path, f"is {kind_of(value)}; a list of tool objects is needed. {REMOVE}")
    return value


def _plain(row: dict, column: str | None, strict: bool) -> str | None:
    """An id or bare answer as text; a value of another type is an error if `strict`, else ignored."""
    value = row.get(column)
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if strict:
        raise BadRow(column, f"is {kind_of(value)}; a string or a number is needed. {REMOVE}")
    return None


def _mean_logp(value: object, path: str) -> float | None:
    """A number of 0 or less, also as text (CSV)."""
    if value is None or value == "":
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not -math.inf < number <= 0:
        raise BadRow(path, f"is {kind_of(value)}; a mean log-probability (finite, at most 0) is needed. {REMOVE}")
    return number
