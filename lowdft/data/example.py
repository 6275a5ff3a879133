"""One training row, whatever layout it came in: first as turns that know their place in the file, then an example."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

Message = dict  # {"role": str, "content": str | None, ...} as chat templates take them


@dataclass
class Example:
    """A prompt with its good answer and, perhaps, ready negatives.

    `prompt` and `completion` are both strings, or both lists of messages; the completion is then the one assistant
    turn that is trained (the last of the row). `negatives` are other answers in the place of the completion: strings,
    or lists of messages like the completion. `answer` is the bare answer ("9.9") where the row has one beside the
    completion, for checking accuracy. `source` says where the row stands ("train.jsonl:3") for messages to people.
    """

    example_id: str
    prompt: str | list[Message]
    completion: str | list[Message]
    negatives: list[str | list[Message]] = field(default_factory=list)
    tools: list[dict] | None = None
    source: str = ""
    answer: str | None = None
    aligned_logps: float | None = None  # mean log-probability a token of the completion under aligned models


@dataclass
class Turn:
    """One message and its place: "messages[1]", or the bare column ("answer") where it was written as text."""

    message: dict
    path: str
    keys: tuple[str, str] | None = None  # what the user calls role and content; None for text

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
    """A row in canonical parts, not yet judged: roles and contents are as found."""

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
        """Where the one turn stands that is trained, as "messages[3]"."""
        return self.completion[0].path


def normal(text: str) -> str:
    """Text as compared: Unicode NFC, runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def contents(turns: Iterable[Turn]) -> list[tuple]:
    """What is said by whom, normalised, without the system message."""
    return [(t.role, normal(t.text) if isinstance(t.text, str) else t.text) for t in turns if t.role != "system"]


def opening_turns(prompt: list[Turn]) -> list[Turn]:
    """Assistant turns before the first user turn, as ShareGPT dumps have them: these are dropped."""
    first_user = next((i for i, turn in enumerate(prompt) if turn.role == "user"), 0)
    return [turn for turn in prompt[:first_user] if turn.role == "assistant"]


def is_blank(text: object) -> bool:
    """Whether a text shows nothing: empty, white space or zero-width characters only."""
    return isinstance(text, str) and all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def is_empty(turn: Turn) -> bool:
    """Whether a turn says nothing: no text that shows, and no tool calls."""
    return not turn.message.get("tool_calls") and (turn.text is None or is_blank(turn.text))


def to_example(
    row: Row, prompt_style: str = "chat", system_prompt: str | None = None, prompt_template: str | None = None
) -> Example:
    """The example of a row that passed the checks; its id is the one given, or one made from its content.

    With `prompt_style` "chat" text becomes messages; with "direct" it stays text. `system_prompt` goes before messages
    that have no system message. Opening assistant turns and empty negatives are left out. A prompt of text is put in
    the place of {prompt} in `prompt_template`; where it then stays text and does not end in white space, a space comes
    before the completion and the negatives, as a model writes them after "Answer:".
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
    """A message as chat templates take it: role "tool" for "function", arguments as objects."""
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
    """One text for equal values."""
    return _CANONICAL.encode(value)
