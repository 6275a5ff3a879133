"""The layouts rows come in, and how each becomes a prompt, one trained answer and its ready negatives.

Of a conversation the last assistant turn is trained (`Row.trained_turn` names it); all before it is the prompt. Every
turn remembers its place under the user's own column names, for messages such as "conversations[0].value is missing".

| columns | prompt | completion |
|---|---|---|
| messages, or conversations (ShareGPT) | all turns but the last | the last turn |
| prompt + completion | prompt, text or messages | completion, text or messages |
| prompt + chosen, prompt + real | prompt | chosen or real: an answer, or the whole conversation |
| chosen, or real, alone | all turns but the last | the last turn |
| question + answer, prompt + answer | question or prompt | answer |
| query + response (MetaMathQA) | query | response |
| instruction (+ input) + output (Alpaca) | instruction, blank line, input | output |

Beside these: negatives (a list), rejected, generated, rejected_0… and generated_0… are negatives; system is the system
message; tools; example_id or id; answer, where it is not the completion, is the bare answer; aligned_logps is a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection

from lowdft.data.example import Row, Turn, contents
from lowdft.data.read import REMOVE, Record, cut
from lowdft.errors import UserError
from lowdft.text import nearest

LAYOUTS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt+completion": ("prompt", "completion"),
    "prompt+chosen": ("prompt", "chosen"),
    "prompt+real": ("prompt", "real"),
    "question+answer": ("question", "answer"),
    "instruction+output": ("instruction", "output"),
    "chosen": ("chosen",),
    "real": ("real",),
    "prompt+answer": ("prompt", "answer"),
    "query+response": ("query", "response"),
}
ONLY_ALONE = ("chosen", "real", "prompt+answer", "query+response")  # taken where no other layout fits
CONVERSATIONS = ("messages", "conversations", "chosen", "real")
MAPPABLE = ("prompt", "completion", "messages", "negatives", "example_id", "tools", "system", "answer", "aligned_logps")
KNOWN_COLUMNS = [*dict.fromkeys(c for needed in LAYOUTS.values() for c in needed), "input", "negatives", "rejected"]
SPEAKERS = {
    "role": {name: name for name in ("system", "user", "assistant", "tool", "function")},
    "from": {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
             "tool": "tool", "function": "function"},
}  # fmt: skip


class BadRow(UserError):
    """A row that fits no layout: `field` is where, `text` what was found, what was wanted and the fix."""

    def __init__(self, field: str, text: str):
        super().__init__(f"{field} {text}".strip())
        self.field, self.text = field, text


def detect_layout(columns: Collection[str], mapped: Collection[str] = (), expected: str | None = None) -> str:
    """The layout that these columns make. Names in `mapped` win over others; `expected` is the layout of the file.

    Raises:
        BadRow: no layout fits; the message has the columns found and the nearest known name or all layouts.
    """
    fitting = _fitting(columns, mapped)
    if not fitting:
        raise _no_layout(list(columns), expected)
    return fitting[0]


def _fitting(columns: Collection[str], mapped: Collection[str]) -> list[str]:
    fitting = [name for name, needed in LAYOUTS.items() if all(c in columns for c in needed)]
    fitting = [name for name in fitting if name not in ONLY_ALONE] or fitting[:1]
    by_map = {name: len(set(LAYOUTS[name]) & set(mapped)) for name in fitting}
    return [name for name in fitting if by_map[name] == max(by_map.values())]


def _no_layout(columns: list[str], expected: str | None) -> BadRow:
    if not columns:
        return BadRow("", f"the row has no columns; one of these is wanted: {', '.join(LAYOUTS)}. {REMOVE}")
    found = cut(", ".join(map(str, columns)))
    for column in columns:
        near = nearest(str(column), KNOWN_COLUMNS)
        if near and near != column and near not in columns:
            return BadRow(
                cut(column),
                f'is no known column (found: {found}); did you mean "{near}"? Rename it, or map it with data.columns.',
            )
    if "text" in columns:
        return BadRow(
            "text",
            f"is plain text (found: {found}); nothing says where the prompt ends and the answer "
            "begins, so no token can be scored. Write a prompt and a completion column.",
        )
    if expected:
        missing = next(c for c in LAYOUTS[expected] if c not in columns)
        return BadRow(missing, f"is missing ({found} found); the layout of this file is {expected}. {REMOVE}")
    return BadRow(
        cut(columns[0]),
        f"is of no known layout (columns found: {found}); known are {', '.join(LAYOUTS)}. "
        "Rename the columns, or map them with data.columns: {prompt: …, completion: …}.",
    )


def to_row(record: Record, columns: dict[str, str] | None = None, expected: str | None = None) -> Row:
    """A record in canonical parts. `columns` maps our names to the user's.

    Raises:
        BadRow: no layout fits, two disagree, or a part has not the shape that the layout needs.
    """
    columns = columns or {}
    view = _view(record.columns, columns)
    mapped = [ours for ours in columns if ours in view]
    not_null = [name for name, value in view.items() if value is not None]
    fitting = _fitting(not_null, mapped) or [detect_layout(view, mapped, expected)]
    layout = fitting[0]
    prompt, completion = _split(layout, view, columns)
    for other in fitting[1:]:
        if contents(sum(_split(other, view, columns), [])) != contents(prompt + completion):
            raise BadRow(
                "",
                f"two layouts in one row that disagree: {layout} and {other}; one is wanted. Remove a "
                "column, or say which with data.columns.",
            )
    system = view.get("system")
    if system not in (None, "") and all(turn.text != system for turn in prompt if turn.role == "system"):
        prompt = [Turn({"role": "system", "content": system}, columns.get("system", "system")), *prompt]
    negatives, used = _negatives(view, columns, prompt)
    own_answer = "answer" if "answer" in view and "answer" not in LAYOUTS[layout] else ""
    id_column = columns.get("example_id") or ("example_id" if view.get("example_id") is not None else "id")
    return Row(
        record.where, layout, prompt, completion, negatives, used,
        tools=_tools(view.get("tools"), columns.get("tools", "tools")),
        answer=_plain(record.columns, columns.get("answer") or own_answer, strict="answer" in columns),
        given_id=_plain(record.columns, id_column, strict=True),
        aligned_logps=_mean_logp(view.get("aligned_logps"), columns.get("aligned_logps", "aligned_logps")),
    )  # fmt: skip


def _view(row: dict, columns: dict[str, str]) -> dict:
    """The row under our names; a mapped column hides one that already has its name."""
    renames = {ours: theirs for ours, theirs in columns.items() if ours not in ("answer", "example_id")}
    for ours, theirs in renames.items():
        if theirs not in row and ours in ("prompt", "completion", "messages"):
            raise BadRow(
                theirs,
                f"is missing ({cut(', '.join(map(str, row)))} found); data.columns takes it for {ours}. {REMOVE}",
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
            raise BadRow(answered, f"begins with another prompt than {asked}; the same is wanted. {REMOVE}")
        prompt = max(before, prompt, key=len)
    else:
        prompt = prompt + before
    return prompt, answer[-1:]


def kind_of(value: object) -> str:
    """A JSON value's type in words, with the value cut short."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return f"{names.get(type(value), type(value).__name__)} ({cut(value, 40)})"


def _turns(value: object, path: str, role: str) -> list[Turn]:
    """Text as one turn of `role`; a message or a list of messages as they are."""
    if isinstance(value, dict):
        return [_turn(value, path, sharegpt=False)]
    if isinstance(value, list) and (not value or isinstance(value[0], dict)):
        return _conversation(value, path)
    return [Turn({"role": role, "content": value}, path)]


def _conversation(value: object, path: str, sharegpt: bool = False) -> list[Turn]:
    value = _json_list(value)
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


def _json_list(value: object) -> object:
    """A list written as JSON text, as CSV and many parquet files hold it; anything else unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _negatives(view: dict, columns: dict[str, str], prompt: list[Turn]) -> tuple[list[list[Turn]], list[str]]:
    names = [name for name in view if re.fullmatch(r"negatives|(rejected|generated)(_\d+)?", str(name))]
    names.sort(key=lambda name: (name != "negatives", name.split("_")[0], int(name.partition("_")[2] or -1)))
    negatives, used = [], []
    for name in names:
        path = columns.get(name, name)
        for item_path, item in _items(name, view[name], path):
            turns = _turns(item, item_path, "assistant")
            before = contents(turns[:-1])
            if before and before != contents(prompt)[-len(before) :]:
                raise BadRow(item_path, f"begins with another prompt than the completion; the same is wanted. {REMOVE}")
            negatives.append(turns[-1:])
        if view[name] is not None:
            used.append(path)
    return negatives, used


def _items(name: str, value: object, path: str) -> list[tuple[str, object]]:
    """The negatives of one column, each with its path: a conversation is one, other lists are several."""
    if name == "negatives":
        value = _json_list(value)
        if isinstance(value, str) and path == name:
            raise BadRow(
                path,
                f"is {kind_of(value)}; a list of answers is needed. Write it in a list, or name the column rejected.",
            )
    if value is None or not isinstance(value, list):
        return [] if value is None else [(path, value)]
    is_messages = bool(value) and all(isinstance(item, dict) for item in value)
    if is_messages and (name != "negatives" or any("user" in (m.get("role"), m.get("from")) for m in value)):
        return [(path, value)]
    return [(f"{path}[{i}]", item) for i, item in enumerate(value)]


def _tools(value: object, path: str) -> list[dict] | None:
    value = _json_list(value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(path, f"is {kind_of(value)}; a list of tool objects is needed. {REMOVE}")
    return value


def _plain(row: dict, column: str | None, strict: bool) -> str | None:
    """An id or bare answer as text; a value of another type is an error where `strict`, else passed over."""
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
        raise BadRow(path, f"is {kind_of(value)}; a mean log-probability, finite and at most 0, is needed. {REMOVE}")
    return number
