"""How a turn begins and ends for one tokenizer: the same for training, sampling and evaluation.

A prompt begins as the tokenizer's own encoding of any text does (BOS, where it has one, exactly once). It ends where
the model starts to write: after the template's generation prompt, outside of a think block. An answer ends with the
first of `Turns.end_ids`, the tokens at which sampling stops.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import cached_property

from lowdft.errors import UserError

# The zephyr format, as in the authors' code: for tokenizers without a chat template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PROBE = "lowdft probe"  # an answer that no template rewrites
THINK = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"} | {
    "<|START_THINKING|>": "<|END_THINKING|>"
}
MARKER = re.compile(r"<(?!0x)[^\s<>]+>|\[[^\s\[\]]+\]")  # how control tokens look; <0x0A> is a byte


class Turns:
    """The chat template of a tokenizer, its first ids and its end tokens.

    Args:
        tokenizer: a transformers tokenizer; one without a chat template gets `DEFAULT_CHAT_TEMPLATE` (zephyr).
        model_end_ids: `eos_token_id` of the model's generation settings. Ids that are no control token of this
            tokenizer are left out.

    Raises:
        UserError: nothing ends an answer: no eos_token, no end token in the generation settings or the template.
    """

    def __init__(self, tokenizer, model_end_ids: Iterable[int] = ()):
        self._recent: dict[str, list[int]] = {}
        if not tokenizer.chat_template:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        self.tokenizer = tokenizer
        configured = [token for token in model_end_ids if self._is_marker(token)]
        eos = tokenizer.eos_token_id
        known = configured if eos is None else [eos, *configured]
        self._eos_token = tokenizer.convert_ids_to_tokens(known[0]) if known else ""
        turn_end = self._template_end()
        known = known if turn_end is None else [*known, turn_end]
        if not known:
            raise UserError(
                "nothing ends an answer: the tokenizer has no eos_token, the generation settings have no eos_token_id "
                "that is a control token, and the chat template writes no end token. Set tokenizer.eos_token (in "
                "tokenizer_config.json, for a model folder), or choose a base that has one."
            )
        self._text_end, self._turn_end = known[0], known[0] if turn_end is None else turn_end
        self.end_ids: list[int] = sorted(set(known))  # every token at which an answer ends

    def ids(self, text: str) -> list[int]:
        """Ids of a text without the special tokens that the tokenizer puts around texts; not to be changed in place.

        The last two texts are kept: all answers of a row stand after the same prompt.
        """
        found = self._recent.pop(text, None)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
        self._recent[text] = found
        if len(self._recent) > 2:
            del self._recent[next(iter(self._recent))]
        return found

    def end_for(self, completion: str | list[dict]) -> int:
        """The end token of an answer that has none in its text: of plain text, or of messages under the template."""
        return self._text_end if isinstance(completion, str) else self._turn_end

    @cached_property
    def begin(self) -> list[int]:
        """The ids that the tokenizer's own encoding puts before every text: BOS, or none."""
        own, bare = self.tokenizer("a").input_ids, self.ids("a")
        return next((own[:i] for i in range(len(own)) if own[i : i + len(bare)] == bare), [])

    def begun(self, ids: list[int]) -> list[int]:
        """The ids with `begin` before them, unless a template or the text itself wrote it."""
        return ids if ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def end_of(self, ids: list[int]) -> int | None:
        """The place of the first end token."""
        return next((i for i, token in enumerate(ids) if token in self.end_ids), None)

    def ids_after(self, before: str, text: str) -> tuple[list[int], bool]:
        """Ids of `text` as it stands after `before`, and whether they are those of the whole text.

        Where a token of the whole text spans the boundary, no model that is given `before` could write it: the text
        then counts as tokenized after a separate character, which leaves no space of the tokenizer's own in front.
        """
        start, whole = self.ids(before), self.ids(before + text)
        if whole[: len(start)] == start:
            return whole[len(start) :], True
        for other in ("\n", ".", "a"):
            start, whole = self.ids(other), self.ids(other + text)
            if whole[: len(start)] == start:
                return whole[len(start) :], False
        return self.ids(text), False

    def prompt(self, messages: list[dict], tools: list[dict] | None = None, thinking: bool = False) -> str:
        """The rendered text up to where the model writes its answer.

        A think block that the generation prompt opens is closed unless the answer `thinking`; a header that the
        template writes for answers alone (it ignores `add_generation_prompt`) is added.
        """
        text = self.render(messages, tools, True, thinking) + self._header
        opened = None if thinking else next((tag for tag in THINK if text.rstrip().endswith(tag)), None)
        return text if opened is None else f"{text.rstrip()}\n\n{THINK[opened]}\n\n"

    def answer(
        self, messages: list[dict], completion: list[dict], tools: list[dict] | None = None, thinking: bool = False
    ) -> tuple[str, str]:
        """The rendered prompt, and what the template writes after it for this answer, end of turn included.

        Raises:
            UserError: the template refuses the row, drops the answer's reasoning, or cannot be taken apart.
        """
        if thinks(completion) and not thinking:
            raise UserError(
                "a negative brings reasoning (a think block) and the completion does not; remove the reasoning from "
                "the negative, or add it to the completion"
            )
        before = self.prompt(messages, tools, thinking)
        whole = self.render([*messages, *completion], tools, False, thinking)
        start = len(before) if whole.startswith(before) else self._content_start(messages, completion, tools, whole)
        text = whole[start:]
        if thinks(completion) and not any(closing in text for closing in THINK.values()):
            raise UserError(
                "the chat template drops the reasoning of this answer (<think>…</think>), so that it would be trained "
                "without. Remove it from the row, or set model.chat_template to one that keeps it."
            )
        return before, text

    def render(self, messages, tools, add_generation_prompt: bool, thinking: bool = False) -> str:
        """What the chat template makes of messages.

        Raises:
            UserError: the template raises an error.
        """
        more = {"enable_thinking": thinking} if "enable_thinking" in str(self.tokenizer.chat_template) else {}
        if self.tokenizer.eos_token is None:
            more["eos_token"] = self._eos_token
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
        except Exception as error:  # Jinja and the templates' own raise_exception have no common base
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise UserError(
                f"the chat template refuses this row (roles: {roles}): {error}. Change the row, or set "
                "data.prompt_style: direct."
            ) from error

    @cached_property
    def _probed(self) -> tuple[str, str]:
        """What the template writes around an answer: its header where generation prompts are ignored, and its end."""
        question = [{"role": "user", "content": "?"}]
        try:
            bare, asked = self.render(question, None, False), self.render(question, None, True)
            whole = self.render([*question, {"role": "assistant", "content": PROBE}], None, False)
        except UserError:
            return "", ""  # the rows will say more
        before, found, after = whole.rpartition(PROBE)
        ignored = found and bare == asked and before.startswith(bare)
        header = before[len(bare) :].rstrip(" ") if ignored else ""  # a space is part of the answer's first token
        return header if header.strip() else "", after

    @property
    def _header(self) -> str:
        return self._probed[0]

    def _template_end(self) -> int | None:
        """The control token that the template writes after an answer, if it writes one."""
        seen = (token for token in self.ids(self._probed[1]) if self.tokenizer.decode([token]).strip())
        first = next(seen, None)
        return first if first is not None and self._is_marker(first) else None

    def _is_marker(self, token: int) -> bool:
        if not 0 <= token < len(self.tokenizer):
            return False
        text = self.tokenizer.convert_ids_to_tokens(token) or ""
        return token in self.tokenizer.added_tokens_decoder or bool(MARKER.fullmatch(text))

    def _content_start(self, messages, completion, tools, whole: str) -> int:
        """Where the answer stands in `whole`, for templates that write a prompt otherwise once an answer follows."""
        other = self.render([*messages, {**completion[-1], "content": "\u2063"}], tools, False)
        start = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), 0)
        if not start:
            raise UserError("the chat template writes a prompt and its answer in a form that cannot be told apart")
        return start


def thinks(completion: str | list[dict]) -> bool:
    """Whether an answer brings reasoning: a think block, or the message field reasoning_content."""
    if isinstance(completion, str):
        return False
    said = " ".join(m["content"] for m in completion if isinstance(m.get("content"), str))
    return any(m.get("reasoning_content") for m in completion) or any(closing in said for closing in THINK.values())
