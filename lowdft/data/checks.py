"""Checks each row, and all rows together. An error rejects the row; a warning keeps it and is counted.

| found | verdict |
|---|---|
| text that is null, missing, a number or a list; a lone surrogate | error |
| answer empty or only white space, without tool calls | error |
| answer of zero-width characters only; empty prompt; empty earlier assistant turn | warn |
| U+FFFD or control characters; chat-template markup inside a text | warn |
| role missing or unknown; no user message; the last message is not from the assistant | error |
| two user (or assistant) turns in a row; a system message that is not first | warn |
| assistant turns before the first user turn | warn, dropped |
| old role "function" | warn, becomes "tool" |
| tool call without a name, or with arguments that are not a JSON object; tool_call_id that answers no call | error |
| ready negative that is empty | warn, dropped |
| column that is not used, with a name close to a known one | warn |
| ready negative equal to the completion | warn, kept |
| two rows with the same id | error |
| exact duplicate of a row (same prompt, answer, tools and negatives) | warn, kept |
| prompt that differs from an earlier one only in white space or Unicode form (NFC) | warn, kept |
| an earlier prompt with a different final answer (a number, a letter, yes or no) | warn, kept |
| an earlier prompt with a differently worded answer, or other negatives | accept |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from lowdft.data.example import Row, Turn, canonical_json, is_blank, is_empty, normal, opening_turns
from lowdft.data.formats import SPEAKERS
from lowdft.data.layouts import kind_of, meant, unused_columns
from lowdft.data.read import REMOVE, Finding, Record, cut
from lowdft.text import nearest

MARKUP = re.compile(r"<\|[A-Za-z_]+\|>|\[/?INST\]|<(?:start|end)_of_turn>")
SURROGATE = re.compile("[\ud800-\udfff]")
DAMAGED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def check_row(row: Row) -> list[Finding]:
    """All findings for one row on its own."""
    turns = row.prompt + row.completion
    found = [*_roles(row, turns), *_tool_calls(row, turns)]
    if not any(not f.warning and f.field.endswith((".role", ".from")) for f in found):
        found += _order(row)
    for turn in row.prompt:
        found += _text(row, turn) or _empty_prompt(row, turn)
    if row.completion[0].role == "assistant":
        found += _text(row, row.completion[0]) or _answer(row)
    found += _negatives(row)
    return found


def check_columns(record: Record, layout: str, others: tuple[str, ...]) -> Iterator[Finding]:
    """Warnings about unused columns (see `unused_columns`) whose names are close to known ones that the row lacks."""
    for name in unused_columns(tuple(record.columns), layout, others):
        if (near := meant(name)) and near not in record.columns:
            yield Finding(
                record.where, name, f'did you mean "{near}"?', f"the column {cut(name, 40)}, which is not used"
            )


def _roles(row: Row, turns: list[Turn]) -> Iterator[Finding]:
    for turn in turns:
        if turn.keys is None:
            continue
        known = SPEAKERS[turn.keys[0]]
        names = ", ".join(known)
        if "role" not in turn.message:
            found = cut(", ".join(map(str, turn.message)) or "nothing else")
            yield Finding(row.where, turn.at(0), f"is missing ({found} found); one of {names} is needed. {REMOVE}")
        elif not isinstance(turn.role, str):
            yield Finding(row.where, turn.at(0), f"is {kind_of(turn.role)}; one of {names} is needed. {REMOVE}")
        elif turn.role not in known.values():
            near = nearest(turn.role, list(known))
            hint = f'did you mean "{near}"? ' if near else ""
            text = f'is "{cut(turn.role)}", an unknown role; {hint}known are {names}. '
            yield Finding(row.where, turn.at(0), text + "Rename it, or pass --skip-invalid.")
        elif turn.role == "function":
            yield Finding(row.where, turn.at(0), 'is "function"', 'the old role "function", read as "tool"')


def _order(row: Row) -> Iterator[Finding]:
    """Checks the order of turns, once all roles are known."""
    last = row.completion[0]
    if last.role != "assistant":
        if is_blank(last.text) and last.keys:
            text = f"is an empty {last.role} turn at the end, not an answer; an assistant turn is needed. {REMOVE}"
            yield Finding(row.where, last.path, text)
        else:
            text = f"ends with a {last.role} message: there is no answer; an assistant message is needed. {REMOVE}"
            yield Finding(row.where, last.column, text)
        return
    if all(turn.role != "user" for turn in row.prompt):
        column = row.prompt[-1].column if row.prompt else last.column
        yield Finding(row.where, column, f"has no user message before the answer; at least one is needed. {REMOVE}")
        return
    opening = opening_turns(row.prompt)
    for turn in opening:
        kind = "an assistant turn before the first user turn, dropped"
        yield Finding(row.where, turn.at(0), "comes before any user turn", kind)
    turns = [t for t in [*row.prompt, last] if all(t is not o for o in opening)]
    spoken = [turn for turn in turns if turn.role != "system"]
    for before, turn in zip(spoken, spoken[1:], strict=False):
        if turn.role == before.role in ("user", "assistant"):
            kind = "two turns of one role in a row (many chat templates raise)"
            yield Finding(row.where, turn.at(0), f'is "{turn.role}" twice in a row', kind)
    for turn in turns[1:]:
        if turn.role == "system":
            kind = "a system message that is not first (many chat templates raise or drop it)"
            yield Finding(row.where, turn.at(0), 'is "system" after another turn', kind)


def _text(row: Row, turn: Turn) -> list[Finding]:
    """Errors about a text's type and Unicode, and warnings about its content."""
    text = turn.text
    if text is None and turn.role == "assistant" and turn.message.get("tool_calls"):
        return []
    wanted = "an answer needs at least one token" if turn is row.completion[0] else "text is needed"
    if turn.keys and "content" not in turn.message:
        found = cut(", ".join(str(key) for key in turn.message if key != "role") or "nothing else")
        return [Finding(row.where, turn.at(1), f"is missing ({found} found); {wanted}. {REMOVE}")]
    if text is None:
        no_calls = " and there is no tool_calls" if turn.role == "assistant" and turn.keys else ""
        return [Finding(row.where, turn.at(1), f"is null{no_calls}; {wanted}. {REMOVE}")]
    if not isinstance(text, str):
        return [Finding(row.where, turn.at(1), f"is {kind_of(text)}; text is needed. Write it as a string.")]
    found = []
    surrogate = SURROGATE.search(text)
    if surrogate:
        return [
            Finding(
                row.where,
                turn.at(1),
                f"has half a character ({ascii(surrogate.group())}, a lone surrogate); "
                f"valid Unicode is needed. {REMOVE}",
            )
        ]
    if DAMAGED.search(text):
        kind = "damaged text (U+FFFD or control characters)"
        found.append(Finding(row.where, turn.at(1), "has such a character", kind))
    markup = MARKUP.search(text)
    if markup:
        kind = "chat-template markup inside a text (it may be read as special tokens)"
        found.append(Finding(row.where, turn.at(1), f"has {cut(markup.group())}", kind))
    return found


def _empty_prompt(row: Row, turn: Turn) -> list[Finding]:
    if turn.role == "user" and is_blank(turn.text):
        return [Finding(row.where, turn.at(1), "is empty", "an empty prompt (unconditional text)")]
    if turn.role == "assistant" and is_empty(turn):
        return [Finding(row.where, turn.at(1), "is empty", "an empty earlier assistant turn")]
    return []


def _answer(row: Row) -> list[Finding]:
    turn = row.completion[0]
    if not is_empty(turn):
        return []
    if turn.text.strip():
        return [Finding(row.where, turn.at(1), "shows nothing", "an answer of zero-width characters only")]
    found = "is only whitespace" if turn.text else "is empty"
    return [Finding(row.where, turn.at(1), f"{found}; an answer needs at least one token. {REMOVE}")]


def _tool_calls(row: Row, turns: list[Turn]) -> Iterator[Finding]:
    ids: list[object] = []
    for turn in turns:
        calls = turn.message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            text = f"is {kind_of(calls)}; a list of calls is needed. {REMOVE}"
            yield Finding(row.where, f"{turn.path}.tool_calls", text)
            continue
        for j, call in enumerate(calls):
            ids.append(call.get("id"))
            yield from _call(row, call, f"{turn.path}.tool_calls[{j}]")
        answers = turn.message.get("tool_call_id")
        if answers is not None and answers not in ids:
            known = cut(", ".join(str(i) for i in ids if i is not None)) or "none"
            text = f'is "{cut(answers)}", which answers no call (calls before it: {known}). {REMOVE}'
            yield Finding(row.where, f"{turn.path}.tool_call_id", text)


def _call(row: Row, call: dict, path: str) -> Iterator[Finding]:
    if "function" in call:
        path, call = f"{path}.function", call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        yield Finding(row.where, f"{path}.name", f"is missing; the name of a function is needed. {REMOVE}")
        return
    arguments = call.get("arguments")
    found = kind_of(arguments) if "arguments" in call else "missing"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            found = f"not valid JSON ({cut(arguments)})"
    if not isinstance(arguments, dict):
        yield Finding(row.where, f"{path}.arguments", f"is {found}; a JSON object is needed. {REMOVE}")


def _negatives(row: Row) -> Iterator[Finding]:
    good = row.completion[0]
    said = _said([good]) if row.negatives else ""
    for (turn,) in row.negatives:
        if is_empty(turn) and turn.keys and "content" not in turn.message:
            yield from _text(row, turn)
        elif is_empty(turn):
            yield Finding(row.where, turn.at(1), "is empty", "an empty negative, dropped")
        elif turn.role != "assistant":
            wanted = f'"assistant" is needed in a negative. {REMOVE}'
            yield Finding(row.where, turn.at(0), f'is "{cut(turn.role)}"; {wanted}')
        else:
            yield from _text(row, turn)
            if _said([turn]) == said:
                kind = "a negative equal to the completion, kept"
                yield Finding(row.where, turn.at(1), f"equals {good.at(1)}", kind)


def _said(turns: list[Turn]) -> str:
    """Turns in the form in which they are compared, with white space and Unicode normalised."""
    texts = [normal(turn.text) if isinstance(turn.text, str) else turn.text for turn in turns]
    return canonical_json([[t.role, text, t.message.get("tool_calls")] for t, text in zip(turns, texts, strict=True)])


def check_table(rows: list[Row]) -> list[Finding]:
    """Findings about valid rows compared with each other, in one pass however many rows share a prompt."""
    found: list[Finding] = []
    ids: dict[str, str] = {}
    wholes: dict[str, str] = {}
    exact_prompts: dict[str, dict[str, str]] = {}  # prompt as compared -> prompt as written -> where
    finals: dict[str, dict[object, str]] = {}  # prompt as compared -> final answer -> where
    for row in rows:
        if row.given_id is not None and ids.setdefault(row.given_id, row.where) != row.where:
            text = f'"{cut(row.given_id)}" is also the id of {ids[row.given_id]}; each row needs its own. Change one.'
            found.append(Finding(row.where, "id", text))
        written = canonical_json([turn.message for turn in row.prompt])
        others = [turn.message for part in [row.completion, *row.negatives] for turn in part]
        first = wholes.setdefault(canonical_json([written, others, row.tools]), row.where)
        if first != row.where:
            kind = "an exact duplicate of an earlier row, kept"
            found.append(Finding(row.where, "", f"the row equals {place(first)}", kind))
            continue
        compared = _said(row.prompt)
        earlier = exact_prompts.setdefault(compared, {})
        if earlier and written not in earlier:
            kind = "a prompt that equals an earlier one except for white space or Unicode form, kept"
            text = f"equals that of {place(next(iter(earlier.values())))} except for white space or Unicode form"
            found.append(Finding(row.where, row.prompt[-1].column, text, kind))
        earlier.setdefault(written, row.where)
        final = final_answer(row.completion[0].text)
        if final is not None:
            answers = finals.setdefault(compared, {})
            if answers and final not in answers:
                kind = "the prompt of an earlier row with an answer that disagrees, kept"
                text = f"disagrees with {place(next(iter(answers.values())))}"
                found.append(Finding(row.where, row.completion[0].at(1), text, kind))
            answers.setdefault(final, row.where)
    return found


def final_answer(text: str | None) -> object:
    """The final answer of a text, to compare: the last number of a short text, that after ####, a letter, yes or no."""
    text = (text or "").strip()
    numbers = NUMBER.findall(text.rpartition("####")[2])
    if numbers and ("####" in text or len(text) <= 100):
        return float(numbers[-1].replace(",", ""))
    word = text.strip(".!()").lower()
    return word if re.fullmatch(r"[a-z]|yes|no|true|false", word) else None


def place(where: str) -> str:
    """A row's place in its file: "line 3" or "record [4]"."""
    at = where.rpartition(":")[2]
    return f"record {at}" if at.startswith("[") else f"line {at}"
