"""What is prompt, what is scored: headers, end tokens, truncation, templates."""

from __future__ import annotations

import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from lowdft.data.encode import Encoder
from lowdft.errors import UserError

USER = [{"role": "user", "content": "2+2?"}]
GOOD = [{"role": "assistant", "content": "4."}]


def decoded(tokenizer, *parts):
    return [tokenizer.decode(part) for part in parts]


def test_header_belongs_to_the_prompt_and_one_end_token_to_the_completion(tokenizer):
    encoder = Encoder(tokenizer)
    prompt, completion = encoder.prompt(USER), encoder.completion(USER, GOOD)
    assert decoded(tokenizer, prompt, completion) == [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "4.<|im_end|>",
    ]


def test_negatives_are_rendered_like_the_completion(tokenizer):
    row = Encoder(tokenizer).row({"prompt": USER, "completion": GOOD, "negatives": ["5", GOOD]})
    assert decoded(tokenizer, *row["negative_ids"]) == ["5<|im_end|>", "4.<|im_end|>"]


def test_without_a_template_the_zephyr_format_stands_in():
    tokenizer = make_tokenizer(chat_template=None)
    encoder = Encoder(tokenizer)
    assert tokenizer.decode(encoder.prompt(USER)) == "<|user|>\n2+2?<|im_end|>\n<|assistant|>\n"
    assert tokenizer.decode(encoder.completion(USER, GOOD)) == "4.<|im_end|>"
    assert tokenizer.chat_template is None  # the user's own object is left alone


def test_no_space_is_put_before_an_answer():
    """With a tokenizer that begins every text with a space (Mistral's, Llama 2's): the ids that a model would write."""
    letters = ["<unk>", "</s>", *"▁\n<|>abcdefghijklmnopqrstuvwxyzY.?", "▁Y", "Ye"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, [("▁", "Y"), ("Y", "e")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    answer = [{"role": "assistant", "content": "Yes."}]
    ids = Encoder(spaced).completion([{"role": "user", "content": "hi?"}], answer)
    assert spaced.convert_ids_to_tokens(ids) == ["Ye", "s", ".", "</s>"]


def test_strings_are_raw_text(tokenizer):
    row = Encoder(tokenizer).row({"prompt": "2+2=", "completion": "4"})
    assert decoded(tokenizer, row["prompt_ids"], row["completion_ids"]) == ["2+2=", "4<|im_end|>"]


def test_empty_prompt_has_one_token_to_predict_from(tokenizer):
    assert Encoder(tokenizer).prompt("") == [tokenizer.bos_token_id]


def test_truncation_is_counted_and_leaves_no_end_token(tokenizer):
    encoder = Encoder(tokenizer, max_length=10, max_prompt_length=6)
    row = encoder.row({"prompt": "0123456789", "completion": "abcdefgh", "negatives": ["xy", "uvwxyz"]})
    assert decoded(tokenizer, row["prompt_ids"], row["completion_ids"]) == ["456789", "abcd"]
    assert decoded(tokenizer, *row["negative_ids"]) == ["xy<|im_end|>", "uvwx"]
    cut = encoder.truncation
    assert (cut.prompts, cut.completions, cut.negatives, cut.longest) == (1, 1, 1, 15)
    assert "1 prompts (max_prompt_length 6" in encoder.cuts()


def test_ids_are_taken_as_they_are(tokenizer):
    row = Encoder(tokenizer).row(
        {"prompt_ids": [5], "completion_ids": [6, 2], "negative_ids": [[7]], "example_id": "a"}
    )
    assert row == {"prompt_ids": [5], "completion_ids": [6, 2], "negative_ids": [[7]], "example_id": "a"}


def test_a_template_that_trims_or_rewrites_the_past():
    """Some templates write the last turn otherwise once it is answered; the answer is still found."""
    rewriting = CHAT_TEMPLATE.replace(
        "{% for m in messages %}", "{% if add_generation_prompt %}!{% endif %}{% for m in messages %}"
    ).replace("m['content']", "(m['content'] | trim)")
    tokenizer = make_tokenizer(rewriting)
    assert (
        tokenizer.decode(Encoder(tokenizer).completion(USER, [{"role": "assistant", "content": "  4.\n"}]))
        == "4.<|im_end|>"
    )


def test_a_template_that_refuses_says_so_in_words():
    tokenizer = make_tokenizer("{{ raise_exception('no system role here') }}")
    with pytest.raises(UserError, match=r"rejects this row \(roles: user\).*no system role here"):
        Encoder(tokenizer).prompt(USER)


def test_an_answer_that_is_not_rendered_is_refused():
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("m['content']", "(m['content'] or '')"))
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    with pytest.raises(UserError, match="renders nothing of the answer"):
        Encoder(tokenizer).completion(USER, call)


@pytest.mark.parametrize(
    "lengths, kept, said",
    [
        (
            dict(max_length=16, max_prompt_length=16),
            (12, 4),
            "12 tokens, because max_prompt_length 16 leaves less than",
        ),
        (dict(max_length=17, max_prompt_length=16), (13, 4), "a quarter of max_length 17 for answers"),
        (dict(max_length=16), (12, 4), "because max_prompt_length None leaves less than a quarter of max_length 16"),
        (dict(max_prompt_length=16, context=16), (12, 4), "leaves less than a quarter of the model's context 16"),
        (dict(max_length=64, max_prompt_length=16, context=20), (15, 5), "the model's context 20"),
        (dict(max_length=20, max_prompt_length=6), (6, 14), "1 prompts (max_prompt_length 6; beginning dropped)"),
        (dict(max_length=2, max_prompt_length=6), (1, 1), "max_length 2"),
    ],
)
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_room_for_answers_is_kept_and_the_limit_named(tokenizer, lengths, kept, said, as_ids):
    """`max_prompt_length` may not leave an answer a single token; the same limits hold for rows of ids."""
    row = {"prompt": "q" * 30, "completion": "a" * 30, "negatives": ["n" * 30]}
    if as_ids:
        row = {"prompt_ids": [5] * 30, "completion_ids": [6] * 30, "negative_ids": [[7] * 30]}
    encoder = Encoder(None if as_ids else tokenizer, **lengths)
    row = encoder.row(row)
    assert (len(row["prompt_ids"]), len(row["completion_ids"]), len(row["negative_ids"][0])) == (*kept, kept[1])
    assert said in encoder.cuts()


def test_no_room_at_all_is_refused(tokenizer):
    with pytest.raises(UserError, match="training.max_length is 1; wanted 2 or more"):
        Encoder(tokenizer, max_length=1)


def test_reference_logps_of_what_is_cut_are_dropped():
    """What they score is no longer in the row: of a negative, of the completion, or of both under a cut prompt."""
    ids = {"prompt_ids": [5] * 4, "completion_ids": [6] * 3, "negative_ids": [[7] * 3, [8] * 3]}
    given = ids | {"ref_negative_logps": [-1.0, -2.0], "ref_logps": -3.0}
    assert Encoder(None, max_length=8).row(given) == given
    encoder = Encoder(None, max_length=8)
    row = encoder.row(given | {"negative_ids": [[7] * 3, [8] * 9]})
    assert "ref_negative_logps" not in row and row["ref_logps"] == -3.0
    assert "log-probabilities of 1 rows were dropped" in encoder.cuts()
    row = Encoder(None, max_length=8).row(given | {"completion_ids": [6] * 9})
    assert row["ref_negative_logps"] == [-1.0, -2.0] and "ref_logps" not in row
    row = Encoder(None, max_prompt_length=3).row(given)
    assert not {"ref_negative_logps", "ref_logps"} & set(row)
    row = Encoder(None, max_prompt_length=4).row(given | {"sampling_prompt_ids": [9] * 5})
    assert row["sampling_prompt_ids"] == [9] * 4 and not {"ref_negative_logps", "ref_logps"} & set(row)
