"""Turns rows of text into token ids, exactly as the model will see and write them.

`lowdft.data.turns` decides how a prompt begins and how an answer ends. Here answers are tokenized as part of the whole
text, and rows are cut to length. Generated negatives keep their ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowdft.data.turns import Turns, thinks
from lowdft.errors import UserError

KEPT = ("example_id", "ref_negative_logps", "ref_logps", "aligned_logps", "sampling_prompt_ids")  # copied if given


@dataclass
class Truncation:
    """Counts what was cut to length or at an end token; `longest` is the longest row in tokens."""

    prompts: int = 0
    completions: int = 0
    negatives: int = 0
    longest: int = 0
    ended: int = 0  # answers cut at an end token inside their text
    apart: int = 0  # answers whose first token in the whole text would span the end of the prompt
    unscored: int = 0  # rows whose reference log-probabilities were dropped


class Encoder:
    """Turns prompts and completions into token ids for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; one without a chat template gets `turns.DEFAULT_CHAT_TEMPLATE` (zephyr).
            None if the rows are token ids already.
        max_length, max_prompt_length: tokens, None for no limit. A quarter of `max_length` is kept for answers: prompts
            are cut to the rest even if `max_prompt_length` allows more.
        context: the model's context length in tokens, an upper limit for `max_length`.
        model_end_ids: `eos_token_id` of the model's generation settings.

    Raises:
        UserError: no token ends an answer, or `max_length` has no room for a prompt and an answer.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        context: int | None = None,
        model_end_ids: Iterable[int] = (),
    ):
        self.turns = None if tokenizer is None else Turns(tokenizer, model_end_ids)
        self.limited_by = "max_length"
        if context and (max_length is None or max_length > context):
            max_length, self.limited_by = context, "the model's context"
        if max_length is not None and max_length < 2:
            raise UserError(f"training.max_length is {max_length}; wanted 2 or more, for a prompt and its completion")
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation = Truncation()

    @property
    def prompt_limit(self) -> int | None:
        """The longest prompt in tokens: `max_prompt_length`, or three quarters of `max_length` if that is less.

        It does not depend on the row, so negatives are sampled from exactly the prompt that is trained on.
        """
        rest = None if self.max_length is None else self.max_length - max(1, self.max_length // 4)
        limits = [limit for limit in (self.max_prompt_length, rest) if limit]
        return min(limits, default=None)

    @property
    def tokenizer(self):
        """The tokenizer with a chat template; None for rows of ids."""
        return None if self.turns is None else self.turns.tokenizer

    @property
    def end_ids(self) -> list[int]:
        """All tokens that end an answer, in rows and in sampling."""
        return self.turns.end_ids

    def prompt(self, prompt: str | list[dict], tools: list[dict] | None = None, thinking: bool = False) -> list[int]:
        """Ids of a prompt: raw text, or messages through the template. Both begin as the tokenizer begins a text.

        Args:
            thinking: the answer begins in a think block, if the template has one (`turns.thinks`).
        """
        text = prompt if isinstance(prompt, str) else self.turns.prompt(prompt, tools, thinking)
        ids = self.turns.begun(self.turns.ids(text))
        if not ids:
            start = self.tokenizer.bos_token_id
            ids = [self.turns.end_for(prompt) if start is None else start]
        return self._cut_prompt(ids)

    def completion(
        self, prompt: str | list[dict], completion: str | list[dict], tools=None, thinking: bool = False
    ) -> list[int]:
        """Ids of an answer to a prompt, up to and including the first end token, where sampling would stop.

        Args:
            thinking: as for the prompt.

        Raises:
            UserError: the template does not render the answer (for example tool calls in a template without tools), or
                the answer contains reasoning and the prompt is not `thinking`.
        """
        if isinstance(completion, str):
            before, text = prompt, completion
        else:
            before, text = self.turns.answer(prompt, completion, tools, thinking)
        ids, whole = self.turns.ids_after(before, text)
        self.truncation.apart += not whole
        stop = self.turns.end_of(ids)
        content = ids if stop is None else ids[:stop]
        if not content and not isinstance(completion, str):
            raise UserError(
                "the chat template renders nothing of the answer; perhaps it does not support tool calls. Choose a "
                "model whose template does, or remove the row."
            )
        if stop is None:
            return [*content, self.turns.end_for(completion)]
        self.truncation.ended += self._says_more(completion)
        return [*content, ids[stop]]

    def text(self, ids: list[int]) -> str:
        """An answer's text without its end token, other special tokens and surrounding white space."""
        stop = self.turns.end_of(ids)
        return self.tokenizer.decode(ids if stop is None else ids[:stop], skip_special_tokens=True).strip()

    def fit(self, prompt_ids: list[int], completion_ids: list[int], kind: str = "completions") -> list[int]:
        """The completion, cut at the end so that prompt + completion fit `max_length`; counts cuts under `kind`."""
        total = len(prompt_ids) + len(completion_ids)
        self.truncation.longest = max(self.truncation.longest, total)
        if self.max_length is None or total <= self.max_length:
            return completion_ids
        setattr(self.truncation, kind, getattr(self.truncation, kind) + 1)
        return completion_ids[: self.max_length - len(prompt_ids)]

    def cuts(self) -> str | None:
        """A line for people about what was cut and by which limit; None if nothing was."""
        cut, said = self.truncation, []
        if cut.prompts or cut.completions or cut.negatives:
            limit = f"{self.limited_by} {self.max_length}"
            most = f"max_prompt_length {self.max_prompt_length}"
            if self.prompt_limit != self.max_prompt_length:
                most = f"{self.prompt_limit} tokens, because {most} leaves less than a quarter of {limit} for answers"
            said.append(
                f"cut to length: {cut.prompts} prompts ({most}; beginning dropped), {cut.completions} completions and "
                f"{cut.negatives} negatives ({limit}; end dropped, so no end token is scored); the longest row had "
                f"{cut.longest} tokens"
            )
        if cut.ended:
            said.append(f"{cut.ended} answers have an end token inside their text and are cut there, as in sampling")
        if cut.apart:
            said.append(
                f"{cut.apart} answers would share a token with the end of their prompt and are tokenized separately "
                "(common if a prompt ends with a space: move the space to the answers)"
            )
        if cut.unscored:
            said.append(
                f"the reference log-probabilities of {cut.unscored} rows were dropped, because what they score was cut"
            )
        return "; ".join(said) or None

    def row(self, row: dict) -> dict:
        """One row of text (`prompt`, `completion`, optionally `negatives`, `tools`, `sampling_prompt`) as ids.

        A row that already has `prompt_ids`, `completion_ids` (and `negative_ids`) keeps them. All are cut to length.
        Reference log-probabilities of the row are dropped if what they score was cut.

        Raises:
            UserError: as `prompt` and `completion`; or the row has tools, but its prompt is text.
        """
        if "prompt_ids" in row:
            given, completion_ids = list(row["prompt_ids"]), list(row["completion_ids"])
            prompt_ids = self._cut_prompt(given)
            negative_ids = [list(ids) for ids in row.get("negative_ids") or []]
        else:
            messages, good, tools = row["prompt"], row["completion"], row.get("tools")
            if tools and isinstance(messages, str):
                raise UserError("the row has tools, but its prompt is text, which shows none; write messages instead")
            thinking = thinks(good)
            given = prompt_ids = self.prompt(messages, tools, thinking)
            completion_ids = self.completion(messages, good, tools, thinking)
            negatives = [self._like(good, negative) for negative in row.get("negatives") or []]
            negative_ids = [self.completion(messages, negative, tools, thinking) for negative in negatives]
        encoded = {
            "prompt_ids": prompt_ids,
            "completion_ids": self.fit(prompt_ids, completion_ids),
            "negative_ids": [self.fit(prompt_ids, ids, "negatives") for ids in negative_ids],
        }
        kept = {key: row[key] for key in KEPT if row.get(key) is not None}
        if "prompt_ids" not in row and row.get("sampling_prompt") is not None:
            kept["sampling_prompt_ids"] = self.prompt(row["sampling_prompt"], tools, thinking)
        prompt_cut = prompt_ids != given
        if "sampling_prompt_ids" in kept:
            asked = list(kept["sampling_prompt_ids"])
            kept["sampling_prompt_ids"] = self._cut_prompt(asked)
            prompt_cut |= kept["sampling_prompt_ids"] != asked
        cut = {
            "ref_negative_logps": prompt_cut or encoded["negative_ids"] != negative_ids,
            "ref_logps": prompt_cut or encoded["completion_ids"] != completion_ids,
        }
        self.truncation.unscored += any([kept.pop(name, None) is not None for name in cut if cut[name]])
        return encoded | kept

    def rows(self, rows: Iterable[dict]) -> list[dict]:
        """Each `row`, with its position as `example_id` if it has none."""
        return [{"example_id": str(i), **self.row(row)} for i, row in enumerate(rows)]

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        """The ids with which every text begins, followed by the last tokens of a prompt that is too long."""
        limit = self.prompt_limit
        if limit is None or len(ids) <= limit:
            return ids
        self.truncation.longest = max(self.truncation.longest, len(ids))
        self.truncation.prompts += 1
        begin = [] if self.turns is None else self.turns.begin
        begin = begin if ids[: len(begin)] == begin and len(begin) < limit else []
        return [*begin, *ids[len(ids) - limit + len(begin) :]]

    def _says_more(self, completion: str | list[dict]) -> bool:
        """Whether an answer's text has an end token before its last character."""
        if isinstance(completion, list):
            completion = " ".join(m["content"] for m in completion if isinstance(m.get("content"), str))
        ends = self.tokenizer.convert_ids_to_tokens(self.end_ids)
        return any(end in completion.strip().removesuffix(end) for end in ends)

    @staticmethod
    def _like(completion, negative):
        """A negative in the form of the completion: if that is messages, a string becomes an assistant message."""
        if isinstance(completion, list) and isinstance(negative, str):
            return [{"role": "assistant", "content": negative}]
        return negative
