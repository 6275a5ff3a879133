"""Rows of text -> token ids, exactly as the model will see and write them.

The prompt is tokenized as generation will (with the template's assistant header, which belongs to the prompt), the
completion as the text after it and appended, with one end-of-turn token that is scored. Generated negatives keep their
own ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from lowdft.errors import UserError

# The zephyr format, as in the authors' code: for tokenizers without a chat template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass
class Truncation:
    """How many prompts and answers were cut to length, and the longest seen (tokens)."""

    prompts: int = 0
    completions: int = 0
    negatives: int = 0
    longest: int = 0
    dropped: list[str] = field(default_factory=list)

    def words(self, max_length: int | None, max_prompt_length: int | None) -> str | None:
        """One line for people, or None when nothing was cut."""
        if not (self.prompts or self.completions or self.negatives):
            return None
        return (
            f"cut to length: {self.prompts} prompts (max_prompt_length {max_prompt_length}, beginning dropped), "
            f"{self.completions} completions and {self.negatives} negatives (max_length {max_length}, end dropped, so "
            f"no end token is scored); the longest row had {self.longest} tokens"
        )


class Encoder:
    """Turns prompts and completions into token ids for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; one without a chat template gets `DEFAULT_CHAT_TEMPLATE` (zephyr).
        max_length, max_prompt_length: tokens, None for no limit.
    """

    def __init__(self, tokenizer, max_length: int | None = None, max_prompt_length: int | None = None):
        if not tokenizer.chat_template:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation = Truncation()

    def prompt(self, prompt: str | list[dict], tools: list[dict] | None = None) -> list[int]:
        """Ids of a prompt: raw text with the tokenizer's own special tokens, or messages through the template."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers end every text
        else:
            ids = self._ids(self._render(prompt, tools, add_generation_prompt=True))
        if not ids:
            start = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if start is None else start]
        if self.max_prompt_length and len(ids) > self.max_prompt_length:
            self.truncation.longest = max(self.truncation.longest, len(ids))
            self.truncation.prompts += 1
            ids = ids[-self.max_prompt_length :]
        return ids

    def completion(self, prompt: str | list[dict], completion: str | list[dict], tools=None) -> list[int]:
        """Ids of an answer to a prompt, ending in exactly one end token.

        Raises:
            UserError: the template does not render the answer (tool calls in a template without tools, say).
        """
        if isinstance(completion, str):
            return [*self._ids(completion), self.tokenizer.eos_token_id]
        before = self._render(prompt, tools, add_generation_prompt=True)
        whole = self._render([*prompt, *completion], tools, add_generation_prompt=False)
        if not whole.startswith(before):
            before = self._shared_start(prompt, completion, tools, before, whole)
        ids = self._after(before, whole[len(before) :])
        ends = {self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids}
        last = max((i for i, token in enumerate(ids) if token in ends), default=None)
        content = ids if last is None else ids[:last]
        if not content:
            raise UserError(
                "the chat template renders nothing of the answer; does it know tool calls? Choose a model "
                "whose template does, or remove the row."
            )
        return [*content, self.tokenizer.eos_token_id if last is None else ids[last]]

    def fit(self, prompt_ids: list[int], completion_ids: list[int], kind: str = "completions") -> list[int]:
        """The completion cut at the end so that prompt + completion fit `max_length`; counted under `kind`."""
        total = len(prompt_ids) + len(completion_ids)
        self.truncation.longest = max(self.truncation.longest, total)
        if self.max_length is None or total <= self.max_length:
            return completion_ids
        setattr(self.truncation, kind, getattr(self.truncation, kind) + 1)
        return completion_ids[: max(1, self.max_length - len(prompt_ids))]

    def row(self, row: dict) -> dict:
        """One dataset row of text (`prompt`, `completion`, optional `negatives`, `tools`) as one of ids.

        A row that already has `prompt_ids`, `completion_ids` (and `negative_ids`) keeps them; both get cut to length.
        """
        if "prompt_ids" in row:
            prompt_ids, completion_ids = list(row["prompt_ids"]), list(row["completion_ids"])
            negative_ids = [list(ids) for ids in row.get("negative_ids") or []]
        else:
            tools = row.get("tools")
            prompt_ids = self.prompt(row["prompt"], tools)
            completion_ids = self.completion(row["prompt"], row["completion"], tools)
            negatives = [self._like(row["completion"], n) for n in row.get("negatives") or []]
            negative_ids = [self.completion(row["prompt"], negative, tools) for negative in negatives]
        encoded = {
            "prompt_ids": prompt_ids,
            "completion_ids": self.fit(prompt_ids, completion_ids),
            "negative_ids": [self.fit(prompt_ids, ids, "negatives") for ids in negative_ids],
        }
        kept = ("example_id", "ref_negative_logps", "ref_logps", "aligned_logps", "sampling_prompt_ids")
        return encoded | {key: row[key] for key in kept if row.get(key) is not None}

    def rows(self, rows: Iterable[dict]) -> list[dict]:
        """`row` for each, with `example_id` set to the position where none is given."""
        return [{"example_id": str(i), **self.row(row)} for i, row in enumerate(rows)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def _spaced(self) -> bool:
        """Does this tokenizer (Mistral's, Llama 2's) put a space before any text that it is given alone?"""
        return self._ids("\na") != self._ids("\n") + self._ids("a")

    def _after(self, before: str, text: str) -> list[int]:
        """Ids of `text` as it stands after `before`, where the tokenizer can tell them apart."""
        if self._spaced:
            whole, start = self._ids(before + text), self._ids(before)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._ids(text)

    def _render(self, messages, tools, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja and the templates' own raise_exception have no common base
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise UserError(
                f"the chat template refuses this row (roles: {roles}): {error}. Change the row, or set "
                "data.prompt_style: direct."
            ) from error

    def _shared_start(self, prompt, completion, tools, before: str, whole: str) -> str:
        """The prompt's part of `whole` for templates that write it otherwise once an answer follows."""
        other = self._render([*prompt, {**completion[-1], "content": "\u2063"}], tools, add_generation_prompt=False)
        shared = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), 0)
        if not shared:
            raise UserError("the chat template writes a prompt and its answer in a form that cannot be told apart")
        return whole[:shared]

    @staticmethod
    def _like(completion, negative):
        """A negative in the form of the completion: a string under messages becomes an assistant message."""
        if isinstance(completion, list) and isinstance(negative, str):
            return [{"role": "assistant", "content": negative}]
        return negative
