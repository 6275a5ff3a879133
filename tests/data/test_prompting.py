"""The prompts that negatives are sampled from."""

from __future__ import annotations

import pytest

from lowdft.data.example import Example
from lowdft.data.prompting import fold_system, sampling_prompt

CHAT = Example("a", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}], [])
TEXT = Example("b", "2+2?", "4")


@pytest.mark.parametrize(
    "strategy, wanted",
    [
        ("chat", CHAT.prompt),
        ("good_system", [{"role": "system", "content": "You are a helpful assistant."}, CHAT.prompt[1]]),
        ("bad_system", [{"role": "system", "content": "You are an unhelpful assistant."}, CHAT.prompt[1]]),
        ("direct", "Be kind.\n\n2+2?"),
    ],
)
def test_strategies(strategy, wanted):
    assert sampling_prompt(CHAT, strategy) == wanted


def test_strings_become_a_user_turn_for_chat_strategies():
    assert sampling_prompt(TEXT, "bad_system", "Be wrong.") == [
        {"role": "system", "content": "Be wrong."},
        {"role": "user", "content": "2+2?"},
    ]


def test_custom_template():
    assert sampling_prompt(TEXT, "custom", template="Q: 1+1?\nA: 3\nQ: {prompt}\nA:") == "Q: 1+1?\nA: 3\nQ: 2+2?\nA:"


def test_system_folds_into_the_first_user_turn():
    assert fold_system(CHAT.prompt) == [{"role": "user", "content": "Be kind.\n\n2+2?"}]
