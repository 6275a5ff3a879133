"""chat: talk to base and adapter in the terminal, streamed, from one loaded model. Piped input works, too."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, TextStreamer

from lowdft import models
from lowdft.data.encode import Encoder
from lowdft.data.prompting import fold_system
from lowdft.errors import UserError
from lowdft.files import write_json
from lowdft.models.reference import reference_on
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import systems
from lowdft.sampling import SamplingSettings
from lowdft.sampling.draw import generating
from lowdft.text import did_you_mean, printable

HELP = """/base, /tuned, /both   choose which model answers
/system TEXT           set the system message (without TEXT: remove it) and start a new conversation
/set KEY=VALUE …       temperature (0: greedy), top_p, top_k, max_new_tokens, seed; without KEY: show them
/save FILE             save the conversations as JSON
/clear                 start a new conversation
/quit                  quit (or Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = [line.split()[0].strip(",") for line in HELP.splitlines()] + ["/tuned", "/both", "/help"]


def main(run: Run) -> None:
    """Reads lines until the input ends: messages, and commands that begin with a slash.

    Raises:
        UserError: no model was trained, or it was trained on another base.
    """
    _, model = next(systems(run, {"after"}))
    chat = Chat(run, model)
    say(f"{', '.join(chat.conversations)} loaded; {chat.speakers[0]} answers. /help lists the commands.")
    for line in _lines():
        try:
            if not chat.take(line.strip()):
                return
        except UserError as error:  # a mistake in a command does not end the chat
            say(str(error))


class Chat:
    """Conversations with one loaded model: one with the adapter on ("tuned") and one with it off ("base").

    If all parameters were trained, there is only "tuned".
    """

    def __init__(self, run: Run, model):
        self.run, self.model = run, model
        self.encoder = Encoder(run.tokenizer, model_end_ids=models.generation_end_ids(run.source))
        self.end_ids = self.encoder.end_ids
        self.context = models.context_length(run.source, run.recipe.model)
        self.settings, self.seed = SamplingSettings(max_new_tokens=512), 0
        self.system: str | None = run.recipe.data.system_prompt
        self.conversations: dict[str, list[dict]] = {"base": [], "tuned": []} if run.recipe.adapter else {"tuned": []}
        self.speakers = ["tuned"]

    def take(self, line: str) -> bool:
        """Handles one line; returns False if it ends the chat."""
        if not line.startswith("/"):
            for name in self.speakers if line else []:
                self._answer(name, line)
            return True
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            say(HELP)
        elif command in ("/base", "/tuned", "/both"):
            self._choose(command[1:])
        elif command in ("/system", "/clear"):
            self.system = (rest.strip() or None) if command == "/system" else self.system
            for messages in self.conversations.values():
                messages.clear()
        elif command == "/set":
            self._set(rest.split())
        elif command == "/save":
            self._save(rest.strip())
        else:
            raise UserError(f"{command} is not a command.{did_you_mean(command, COMMANDS)} /help lists them.")
        return True

    def _choose(self, name: str) -> None:
        wanted = ["base", "tuned"] if name == "both" else [name]
        if set(wanted) - set(self.conversations):
            raise UserError("this run trained all parameters, so there is no adapter to switch off; only /tuned works")
        self.speakers = wanted

    def _set(self, pairs: list[str]) -> None:
        known = {**dataclasses.asdict(self.settings), "seed": self.seed}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in known:
                raise UserError(f"/set {key}: wanted one of {', '.join(known)}")
            try:
                known[key] = type(known[key])(value)
            except ValueError:
                raise UserError(f"/set {pair}: wanted a number") from None
        if known["temperature"] < 0 or not 0 < known["top_p"] <= 1 or known["top_k"] < 0 or known["max_new_tokens"] < 1:
            raise UserError("/set: wanted temperature and top_k 0 or more, top_p in (0, 1], max_new_tokens 1 or more")
        self.seed = known.pop("seed")
        self.settings = SamplingSettings(**known)
        if not pairs:
            say(" ".join(f"{key}={value}" for key, value in {**known, "seed": self.seed}.items()))

    def _save(self, path: str) -> None:
        if not path:
            raise UserError("/save needs a file name")
        settings = {**dataclasses.asdict(self.settings), "seed": self.seed}
        write_json(path, {"system": self.system, "settings": settings, **self.conversations})
        say(f"{path}: written")

    def _answer(self, name: str, text: str) -> None:
        messages = self.conversations[name]
        ids = self._ids([*messages, {"role": "user", "content": text}])
        if self.context and len(ids) >= self.context:
            raise UserError(
                f"the conversation with {name} has {len(ids)} tokens, but the model's context is {self.context}; "
                "type /clear"
            )
        print(f"{name}: " if len(self.conversations) > 1 else "", end="", flush=True)
        with reference_on(self.model) if name == "base" else contextlib.nullcontext():
            answer = self._generate(ids)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _ids(self, messages: list[dict]) -> list[int]:
        if self.run.recipe.data.prompt_style == "direct":  # a model for plain text has no turns
            return self.encoder.prompt(messages[-1]["content"])
        if self.system is None:
            return self.encoder.prompt(messages)
        messages = [{"role": "system", "content": self.system}, *messages]
        try:
            return self.encoder.prompt(messages)
        except UserError:  # the template has no system role
            return self.encoder.prompt(fold_system(messages))

    def _generate(self, ids: list[int]) -> str:
        settings = self.settings
        sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        room = self.context - len(ids) if self.context else settings.max_new_tokens
        config = GenerationConfig(
            do_sample=settings.temperature > 0,
            max_new_tokens=min(settings.max_new_tokens, room),
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            **(sampled if settings.temperature > 0 else {}),
        )
        streamer = _Keeping(self.run.tokenizer)
        torch.manual_seed(self.seed)
        prompt = torch.tensor([ids], device=self.model.device)
        with generating(self.model, self.end_ids, settings) as model, contextlib.suppress(KeyboardInterrupt):
            model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer)
        streamer.end()
        return "".join(streamer.texts).strip()


class _Keeping(TextStreamer):
    """Prints an answer while it is generated, and keeps it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []
        self.ended = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.texts.append(text)
        print(printable(text), end="\n" if stream_end else "", flush=True)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            super().end()


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt if it is a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (makes input() remember lines)
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
