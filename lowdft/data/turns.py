"""How a turn begins and ends for one tokenizer, in training, sampling and evaluation alike.

A prompt begins as the tokenizer begins any text (with exactly one BOS token, if it has one). It ends where the model
starts to write: after the template's generation prompt, outside a think block. An answer ends with the first of
`Turns.end_ids`, the tokens at which sampling stops.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import cached_property

from lowdft.errors import UserError

# The zephyr format, as in the authors' code, for tokenizers without a chat template.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PROBE = "lowdft probe"  # a sample answer that templates do not change
THINK = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"} | {
    "<|START_THINKING|>": "<|END_THINKING|>"
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message
MARKER = re.compile(r"<(?!0x)[^\s<>]+>|\[[^\s\[\]]+\]")  # the form of control tokens; <0x0A> is a byte


class Turns:
    """The chat template of a tokenizer, its first ids and its end tokens.

    Args:
        tokenizer: a transformers tokenizer; without a chat template it gets `DEFAULT_CHAT_TEMPLATE` (zephyr).
        model_end_ids: `eos_token_id` of the model's generation settings. Ids that are not a control token of this
            tokenizer are ignored.

    Raises:
        UserError: there is no end token in the tokenizer, the generation settings or the template.
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
                "no token ends an answer: the tokenizer has no eos_token, the generation settings have no eos_token_id "
                "that is a control token, and the chat template writes no end token. Set tokenizer.eos_token (for a "
                "model folder, in tokenizer_config.json), or choose a base that has one."
            )
        self._text_end, self._turn_end = known[0], known[0] if turn_end is None else turn_end
        self.end_ids: list[int] = sorted(set(known))  # all tokens that end an answer

    def ids(self, text: str) -> list[int]:
        """Ids of a text without the special tokens that the tokenizer adds around texts. Do not change them in place.

        The last two texts are cached, because all answers of a row follow the same prompt.
        """
        found = self._recent.pop(text, None)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
        self._recent[text] = found
        if len(self._recent) > 2:
            del self._recent[next(iter(self._recent))]
        return found

    def end_for(self, completion: str | list[dict]) -> int:
        """The end token to append to an answer without one, for plain text or for messages under the template."""
        return self._text_end if isinstance(completion, str) else self._turn_end

    @cached_property
    def begin(self) -> list[int]:
        """The ids that the tokenizer puts before every text: BOS, or none."""
        own, bare = self.tokenizer("a").input_ids, self.ids("a")
        return next((own[:i] for i in range(len(own)) if own[i : i + len(bare)] == bare), [])

    def begun(self, ids: list[int]) -> list[int]:
        """The ids with `begin` in front, unless the template or the text already has it."""
        return ids if ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def end_of(self, ids: list[int]) -> int | None:
        """The position of the first end token."""
        return next((i for i, token in enumerate(ids) if token in self.end_ids), None)

    def ids_after(self, before: str, text: str) -> tuple[list[int], bool]:
        """Ids of `text` when it follows `before`, and whether they agree with the tokens of the whole text.

        If a token of the whole text spans the boundary, a model that continues `before` could not write it. Then `text`
        is tokenized after a separator character, so that the tokenizer adds no space in front.
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

        A think block that the generation prompt opens is closed unless the answer is `thinking`. If the template
        ignores `add_generation_prompt`, the header that it writes before answers is added.

        Raises:
            UserError: the template rejects the row, or leaves out its system message or its tools.
        """
        text = self.render(messages, tools, True, thinking) + self._header
        _require_shown(text, messages, tools)
        opened = None if thinking else next((tag for tag in THINK if text.rstrip().endswith(tag)), None)
        return text if opened is None else f"{text.rstrip()}\n\n{THINK[opened]}\n\n"

    def answer(
        self, messages: list[dict], completion: list[dict], tools: list[dict] | None = None, thinking: bool = False
    ) -> tuple[str, str]:
        """The rendered prompt, and what the template writes after it for this answer, including the end of the turn.

        Raises:
            UserError: the template rejects the row, leaves out its system message, its tools or the answer's
                reasoning, or ends answers with a marker that is not a token; or prompt and answer cannot be separated.
        """
        if self._spelled_end:
            raise UserError(
                f"the chat template ends an answer with {self._spelled_end}, which this tokenizer spells in several "
                "tokens, so no sampled answer would end there. Set model.chat_template to the base's own format, or "
                "data.prompt_style: direct."
            )
        if thinks(completion) and not thinking:
            raise UserError(
                "a negative contains reasoning (a think block) but the completion does not; remove the reasoning from "
                "the negative, or add some to the completion"
            )
        before = self.prompt(messages, tools, thinking)
        whole = self.render([*messages, *completion], tools, False, thinking)
        start = len(before) if whole.startswith(before) else self._content_start(messages, completion, tools, whole)
        text = whole[start:]
        reasoning = [said for m in completion for name in REASONING if isinstance(said := m.get(name), str)]
        written = any(closing in text for closing in THINK.values()) or bool(reasoning)
        if thinks(completion) and not (written and all(said.strip() in text for said in reasoning)):
            raise UserError(
                "the chat template drops the reasoning of this answer (<think>…</think>), so it would not be trained. "
                "Remove it from the row, or set model.chat_template to a template that keeps it."
            )
        return before, text

    def render(self, messages, tools, add_generation_prompt: bool, thinking: bool = False) -> str:
        """The messages rendered by the chat template.

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
                f"the chat template rejects this row (roles: {roles}): {error}. Change the row, or set "
                "data.prompt_style: direct."
            ) from error

    @cached_property
    def _probed(self) -> tuple[str, str]:
        """What the template writes around an answer: its end, and its header if generation prompts are ignored."""
        question = [{"role": "user", "content": "?"}]
        try:
            bare, asked = self.render(question, None, False), self.render(question, None, True)
            whole = self.render([*question, {"role": "assistant", "content": PROBE}], None, False)
        except UserError:
            return "", ""  # rendering the rows will report the error
        before, found, after = whole.rpartition(PROBE)
        ignored = found and bare == asked and before.startswith(bare)
        header = before[len(bare) :].rstrip(" ") if ignored else ""  # a space is part of the answer's first token
        return header if header.strip() else "", after

    @cached_property
    def _spelled_end(self) -> str | None:
        """A marker that the template writes after an answer, if it consists of several tokens of this tokenizer."""
        first = next(iter(self._probed[1].split()), "")
        return first if MARKER.fullmatch(first) and len(self.ids(first)) > 1 else None

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
        """The position of the answer in `whole`, for templates that render a prompt differently before an answer."""
        other = self.render([*messages, {**completion[-1], "content": "\u2063"}], tools, False)
        start = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), 0)
        if not start:
            raise UserError(
                "the chat template renders prompt and answer so that they cannot be separated; set model.chat_template"
            )
        return start


def _require_shown(text: str, messages: list[dict], tools: list[dict] | None) -> None:
    """Raises UserError unless a rendered prompt has the texts of its system messages and the names of its tools."""
    for message in messages:
        if message["role"] == "system" and isinstance(message.get("content"), str):
            if message["content"].strip() not in text:
                raise UserError(
                    "the chat template leaves out the system message of this row. Put it into the first user turn, "
                    "remove it (data.system_prompt), or set model.chat_template to a template that shows it."
                )
    functions = [tool.get("function", tool) for tool in tools or []]
    names = [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]
    if missing := [name for name in names if name not in text]:
        raise UserError(
            f"the chat template leaves out the row's tools (the first: {missing[0]}). Choose a base whose template has "
            "tools, set model.chat_template, or remove the row."
        )


def thinks(completion: str | list[dict]) -> bool:
    """Whether an answer contains reasoning: a think block, or one of the message fields `REASONING`."""
    if isinstance(completion, str):
        return False
    said = " ".join(m["content"] for m in completion if isinstance(m.get("content"), str))
    in_field = any(m.get(name) for m in completion for name in REASONING)
    return in_field or any(closing in said for closing in THINK.values())
