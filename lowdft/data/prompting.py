"""Prompts for sampling negatives: the paper's strategies (arXiv 2502.18679, Section 5 and Figure 7), and `few_shot`.

`few_shot` puts some solved training rows before the prompt, so that answers look like the completions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from lowdft.config.sections import NegativesSection
from lowdft.data.encode import Encoder
from lowdft.data.example import Example, Message, normal
from lowdft.data.turns import thinks
from lowdft.errors import UserError

SYSTEM_PROMPTS = {
    "good_system": (  # UltraFeedback's on truthfulness, as in the paper
        "The assistant should answer truthfully and be faithful to factual knowledge as well as given contexts, never "
        "making up any new facts that aren't true or cannot be grounded in the instruction."
    ),
    "bad_system": "You are an unhelpful assistant.",
}


def sampling_prompt(
    example: Example,
    strategy: str,
    system_prompt: str | None = None,
    template: str | None = None,
    shots: Sequence[Example] = (),
) -> str | list[Message]:
    """The prompt that negatives are sampled from.

    Args:
        strategy: "direct" (the text alone), "chat" (the chat template), "good_system" or "bad_system" (the chat
            template with a system message that replaces the row's), "custom" (`template` with {prompt}), "few_shot"
            (`shots` in the format of training rows, then the row's prompt).
        system_prompt: the system message of good_system and bad_system; None uses `SYSTEM_PROMPTS`.
    """
    if strategy == "few_shot":
        return _after_shots(example, shots)
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


def sampling_ids(section: NegativesSection, rows: Sequence[Example], encoder: Encoder, example: Example) -> list[int]:
    """Ids of the prompt that an example's negatives are sampled from.

    If the template has no system role, the system message goes into the first user turn.

    Args:
        rows: the training rows, from which strategy few_shot takes its shots.
    """
    shots = choose_shots(example, rows, section.shots, section.seed) if section.strategy == "few_shot" else []
    prompt = sampling_prompt(example, section.strategy, section.system_prompt, section.template, shots)
    thinking = thinks(example.completion)
    try:
        return encoder.prompt(prompt, example.tools, thinking)
    except UserError:
        if isinstance(prompt, list) and prompt[0]["role"] == "system":
            return encoder.prompt(fold_system(prompt), example.tools, thinking)
        raise


def choose_shots(example: Example, rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` rows of the example's form, drawn with `seed` and its id; none has its id or its prompt.

    If there are fewer such rows, all of them.
    """
    own, is_text = normal(plain_text(example.prompt)), isinstance(example.prompt, str)
    rng, chosen, seen = random.Random(json.dumps([seed, example.example_id])), [], set()
    while len(chosen) < count and len(seen) < len(rows):
        pick = int(rng.random() * len(rows))
        row = rows[pick]
        same_form = isinstance(row.prompt, str) == is_text and row.tools == example.tools
        is_own = row.example_id == example.example_id or normal(plain_text(row.prompt)) == own
        if pick not in seen and same_form and not is_own:
            chosen.append(row)
        seen.add(pick)
    return chosen


def _after_shots(example: Example, shots: Sequence[Example]) -> str | list[Message]:
    if isinstance(example.prompt, str):
        return "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots) + example.prompt
    system = [m for m in example.prompt if m["role"] == "system"]
    solved = [m for shot in shots for m in [*shot.prompt, *shot.completion] if m["role"] != "system"]
    return [*system, *solved, *(m for m in example.prompt if m["role"] != "system")]


def shot_stop(completions: Sequence[str | list[Message]]) -> list[str]:
    """The text that ends an answer after shots of text: a line break, or a blank line if completions have several."""
    texts = [completion for completion in completions if isinstance(completion, str)]
    if not texts:
        return []
    return ["\n"] if not any("\n" in text.strip() for text in texts) else ["\n\n"]


def fold_system(messages: list[Message]) -> list[Message]:
    """The messages with the system message moved into the first user turn, for templates without a system role."""
    system, *rest = messages
    first = next(i for i, m in enumerate(rest) if m["role"] == "user")
    joined = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return [*rest[:first], joined, *rest[first + 1 :]]


def plain_text(prompt: str | list[Message]) -> str:
    """A prompt without roles: the contents of its turns, separated by blank lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(m["content"] for m in prompt if m.get("content"))


def other_form(completion: str, negative: str) -> bool:
    """Whether a negative is over 3 times longer or shorter (at least 4 characters count), or differs in line breaks."""
    shorter, longer = sorted(max(4, len(text.strip())) for text in (completion, negative))
    return longer > 3 * shorter or ("\n" in negative.strip()) != ("\n" in completion.strip())
