"""How the base is asked for a negative: the paper's prompting strategies (arXiv 2502.18679, Section 5 and Figure 7)."""

from __future__ import annotations

from lowdft.data.example import Example, Message

SYSTEM_PROMPTS = {
    "good_system": "You are a helpful assistant.",
    "bad_system": "You are an unhelpful assistant.",
}


def sampling_prompt(
    example: Example, strategy: str, system_prompt: str | None = None, template: str | None = None
) -> str | list[Message]:
    """The prompt that negatives are sampled from.

    Args:
        strategy: "direct" (the bare text), "chat" (the chat template), "good_system" or "bad_system" (the chat template
            under a system message, which takes the place of the row's own), "custom" (`template` with {prompt}).
        system_prompt: the system message of good_system and bad_system; None takes `SYSTEM_PROMPTS`.
    """
    if strategy == "direct":
        return plain_text(example.prompt)
    if strategy == "custom":
        return template.replace("{prompt}", plain_text(example.prompt))
    messages = example.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if strategy == "chat":
        return messages
    system = {"role": "system", "content": system_prompt or SYSTEM_PROMPTS[strategy]}
    return [system, *(m for m in messages if m["role"] != "system")]


def fold_system(messages: list[Message]) -> list[Message]:
    """The system message moved into the first user turn, for templates that refuse a system role."""
    system, *rest = messages
    first = next(i for i, m in enumerate(rest) if m["role"] == "user")
    joined = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return [*rest[:first], joined, *rest[first + 1 :]]


def plain_text(prompt: str | list[Message]) -> str:
    """A prompt without roles: its contents, a blank line between turns."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(m["content"] for m in prompt if m.get("content"))
