"""One training row of any layout: first as turns with their place in the file, then as an example."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

Message = dict  # {"role": str, "content": str | None, ...} as chat templates take them


@dataclass
class Example:
    """A prompt with its good answer and perhaps negatives.

    `prompt` and `completion` are both strings, or both lists of messages; the completion is then the last assistant
    turn of the row. `negatives` are wrong answers in place of the completion, in the same form. `answer` is the bare
    answer ("9.9") if the row has one in addition to the completion, for checking accuracy. `source` is the row's place
    ("train.jsonl:3"), for messages to people.
    """

    example_id: str
    prompt: str | list[Message]
    completion: str | list[Message]
    negatives: list[str | list[Message]] = field(default_factory=list)
    tools: list[dict] | None = None
    source: str = ""
    answer: str | None = None
    aligned_logps: float | None = None  # mean log-probability per token of the completion under aligned models


@dataclass
class Turn:
    """One message and its place: "messages[1]", or just the column ("answer") if it was a text."""

    message: dict
    path: str
    keys: tuple[str, str] | None = None  # the user's names for role and content; None for text

    @property
    def role(self) -> object:
        return self.message.get("role")

    @property
    def text(self) -> object:
        return self.message.get("content")

    def at(self, key: int) -> str:
        """The field path of the role (0) or of the content (1)."""
        return f"{self.path}.{self.keys[key]}" if self.keys else self.path

    @property
    def column(self) -> str:
        return self.path.partition("[")[0]


@dataclass
class Row:
    """A row in its parts, not checked yet: roles and contents are as found."""

    where: str
    layout: str
    prompt: list[Turn]
    completion: list[Turn]
    negatives: list[list[Turn]] = field(default_factory=list)
    negative_columns: list[str] = field(default_factory=list)
    tools: list[dict] | None = None
    answer: str | None = None
    given_id: str | None = None
    aligned_logps: float | None = None

    @property
    def is_text(self) -> bool:
        return all(turn.keys is None for turn in self.prompt + self.completion)

    @property
    def trained_turn(self) -> str:
        """The place of the turn that is trained on, such as "messages[3]"."""
        return self.completion[0].path


def normal(text: str) -> str:
    """Text in the form in which it is compared: Unicode NFC, white space collapsed, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def contents(turns: Iterable[Turn]) -> list[tuple]:
    """Roles and normalised texts of the messages, without the system message."""
    return [(t.role, normal(t.text) if isinstance(t.text, str) else t.text) for t in turns if t.role != "system"]


def opening_turns(prompt: list[Turn]) -> list[Turn]:
    """Assistant turns before the first user turn, which some ShareGPT data has; they are dropped."""
    first_user = next((i for i, turn in enumerate(prompt) if turn.role == "user"), 0)
    return [turn for turn in prompt[:first_user] if turn.role == "assistant"]


def is_blank(text: object) -> bool:
    """Whether a text is invisible: empty, or only white space or zero-width characters."""
    return isinstance(text, str) and all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def is_empty(turn: Turn) -> bool:
    """Whether a turn is empty: no visible text and no tool calls."""
    return not turn.message.get("tool_calls") and (turn.text is None or is_blank(turn.text))


def to_example(
    row: Row, prompt_style: str = "chat", system_prompt: str | None = None, prompt_template: str | None = None
) -> Example:
    """The example of a row that passed the checks. Its id is the one given, or is made from its content.

    With `prompt_style` "chat" text becomes messages; with "direct" it stays text. `system_prompt` is added to messages
    without a system message. Assistant turns at the beginning and empty negatives are left out. A string prompt
    replaces {prompt} in `prompt_template`; if the result stays text and does not end in white space, the completion and
    the negatives get a space in front, as a model would write them after "Answer:".
    """
    dropped = [id(turn) for turn in opening_turns(row.prompt)]
    turns = [turn for turn in row.prompt if id(turn) not in dropped]
    kept = [negative for negative in row.negatives if not is_empty(negative[0])]
    if row.is_text and prompt_style == "direct":
        prompt = _templated("\n\n".join(turn.text for turn in turns), prompt_template)
        space = " " if prompt_template and not prompt[-1:].isspace() else ""
        completion, *negatives = (_after(space, turn.text) for (turn,) in [row.completion, *kept])
    else:
        prompt = [_message(turn) for turn in turns]
        if row.is_text:
            prompt[-1]["content"] = _templated(prompt[-1]["content"], prompt_template)
        if system_prompt is not None and all(turn.role != "system" for turn in turns):
            prompt.insert(0, {"role": "system", "content": system_prompt})
        completion = [_message(turn) for turn in row.completion]
        negatives = [[_message(turn) for turn in negative] for negative in kept]
    made = hashlib.sha256(canonical_json([prompt, completion, row.tools]).encode()).hexdigest()[:16]
    name = row.given_id or made
    return Example(name, prompt, completion, negatives, row.tools, row.where, row.answer, row.aligned_logps)


def _templated(prompt: str, template: str | None) -> str:
    return template.replace("{prompt}", prompt.strip()) if template else prompt


def _after(space: str, text: str) -> str:
    return space + text.lstrip() if space else text


def _message(turn: Turn) -> dict:
    """A message as chat templates expect it: role "tool" instead of "function", arguments as objects."""
    message = {"content": None} | turn.message
    if message["role"] == "function":
        message["role"] = "tool"
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    else:
        message.pop("tool_calls", None)
    return message


def _call(call: dict) -> dict:
    if "function" in call:
        return call | {"function": _call(call["function"])}
    arguments = call.get("arguments")
    return call | {"arguments": json.loads(arguments)} if isinstance(arguments, str) else call


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)


def canonical_json(value: object) -> str:
    """The same text for equal values."""
    return _CANONICAL.encode(value)
