"""The prompts that negatives are sampled from."""

from __future__ import annotations

import pytest

from lowdft.data.example import Example
from lowdft.data.prompting import choose_shots, fold_system, other_form, sampling_prompt, shot_stop

CHAT = Example("a", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}], [])
TEXT = Example("b", "2+2?", "4")
TRUTHFUL = (  # the paper's, Figure 7
    "The assistant should answer truthfully and be faithful to factual knowledge as well as given contexts, never "
    "making up any new facts that aren't true or cannot be grounded in the instruction."
)


@pytest.mark.parametrize(
    "strategy, wanted",
    [
        ("chat", CHAT.prompt),
        ("good_system", [{"role": "system", "content": TRUTHFUL}, CHAT.prompt[1]]),
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


def test_few_shot_shows_other_rows_as_training_does():
    """Drawn by the row's id, the same every time; never the row itself, nor one with its prompt."""
    rows = [Example(str(i), f"{i}?\nA:", f" {i}.") for i in range(9)] + [Example("again", "3?\n A:", " 4.")]
    shots = choose_shots(rows[3], rows, 4, seed=0)
    assert shots == choose_shots(rows[3], rows, 4, seed=0) != choose_shots(rows[3], rows, 4, seed=1)
    assert len({shot.example_id for shot in shots}) == 4
    everything = choose_shots(rows[3], rows, 99, seed=0)
    assert {shot.example_id for shot in everything} == {str(i) for i in range(9)} - {"3"}
    asked = sampling_prompt(rows[3], "few_shot", shots=shots[:1])
    assert asked == f"{shots[0].prompt}{shots[0].completion}\n\n3?\nA:"
    assert shot_stop([row.completion for row in rows]) == ["\n"] and shot_stop([" a\nb"]) == ["\n\n"]


def test_few_shot_in_messages():
    """The row's own system message stands first, the shots' are left out; text rows are no shots for messages."""
    shot = Example("s", CHAT.prompt, [{"role": "assistant", "content": "4"}])
    asked = Example("t", [CHAT.prompt[0], {"role": "user", "content": "3+3?"}], shot.completion)
    assert choose_shots(asked, [TEXT, asked, shot], 2, seed=0) == [shot]
    wanted = [CHAT.prompt[0], CHAT.prompt[1], shot.completion[0], asked.prompt[1]]
    assert sampling_prompt(asked, "few_shot", shots=[shot]) == wanted
    assert shot_stop([shot.completion]) == []


@pytest.mark.parametrize(
    "completion, negative, other",
    [
        ("24", "7", False),
        (" green", "red", False),
        ("24", "It is twenty-four.", True),
        ("one", "two\nthree", True),
        ("a b c d e f g h i j k l", "abc", True),
    ],
)
def test_other_form(completion, negative, other):
    assert other_form(completion, negative) == other
