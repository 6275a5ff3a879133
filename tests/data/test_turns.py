"""What a model would write for an answer and what a completion of that text becomes are the same ids, end included."""

from __future__ import annotations

import functools
import string

import pytest
from templates import CHATML, CHATML_ASKS, FAMILIES, Family
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lowdft.data.encode import Encoder
from lowdft.errors import UserError
from lowdft.sampling.draw import finish

USER = [{"role": "user", "content": "2+2?"}]
LONGER = [*USER, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Why, then?"}]
ANSWERS = ["4", "It is 4.", "First line.\n\nSecond: 2 + 2 = 4.", "- one\n- two", "naïve ½", "call [x] now please"]
CORPUS = [*ANSWERS, "user assistant model the answer is", "[INST] a [/INST] b", "A: yes.\n4 4 4", "It is the line."]


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind with its control tokens, trained on a few lines."""
    backend = Tokenizer(models.BPE(unk_token=None if family.kind == "byte" else "<unk>"))
    alphabet = [*string.printable, *"ï½▁｜"]
    if family.kind == "byte":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        spaces = normalizers.Replace(" ", "▁")
        spaced = family.kind == "spaced"
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if spaced else spaces
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|▁+|\n+"), "isolated")  # to learn words
    control = [t for t in ("<unk>", family.bos, family.eos, *family.special, *family.added) if t]
    added = [AddedToken(t, special=t not in family.added, rstrip=t in family.rstrip, normalized=False) for t in control]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    if family.kind != "byte":
        backend.pre_tokenizer = None  # SentencePiece merges over the whole text
    backend.add_tokens(added)
    if family.bos:
        named = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[named])
    names = {"bos_token": family.bos, "eos_token": family.eos, "unk_token": "<unk>"}
    named = {name: token for name, token in names.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=family.template, **named)


@functools.cache
def encoder_of(name: str) -> Encoder:
    """The encoder of a family."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    return Encoder(tokenizer, model_end_ids=tokenizer.convert_tokens_to_ids(list(family.generation_ends)))


def said(text: str) -> list[dict]:
    """An assistant turn."""
    return [{"role": "assistant", "content": text}]


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Ids of a text in which every control token stands already."""
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_is_what_the_family_writes(name):
    family, encoder = FAMILIES[name], encoder_of(name)
    prompt, whole = ids_of(encoder, family.asked), ids_of(encoder, family.asked + family.written)
    assert encoder.prompt(USER) == prompt
    end = whole.index(encoder.tokenizer.convert_tokens_to_ids(family.end), len(prompt))
    assert whole[: len(prompt)] == prompt
    assert encoder.completion(USER, said("4")) == whole[len(prompt) : end + 1]


@pytest.mark.parametrize("prompt", [USER, LONGER], ids=["one question", "three turns"])
@pytest.mark.parametrize("name", FAMILIES)
def test_6_a_sampled_answer_and_a_completion_of_its_text_have_the_same_ids(name, prompt):
    encoder, family = encoder_of(name), FAMILIES[name]
    row = encoder.row({"prompt": prompt, "completion": said("4"), "negatives": ANSWERS})
    assert row["prompt_ids"] == encoder.prompt(prompt)  # trained = sampled from
    bos = encoder.tokenizer.bos_token_id
    assert bos is None or (row["prompt_ids"][0] == bos and row["prompt_ids"][1] != bos)
    text = encoder.tokenizer.decode(row["prompt_ids"])
    for answer, negative in zip(ANSWERS, row["negative_ids"], strict=True):
        written = family.written.replace("4", answer, 1)
        continued = ids_of(encoder, encoder.turns.prompt(prompt) + written)
        continued = encoder.turns.begun(continued)[len(row["prompt_ids"]) :]
        sample = finish(continued, encoder.end_ids)  # what a sampler keeps of a model that writes this
        assert sample.finish_reason == "stop" and sample.token_ids[-1] == encoder.turns.end_for(said(""))
        assert encoder.text(sample.token_ids) == answer, text
        assert negative == sample.token_ids
        assert encoder.completion(prompt, said(encoder.text(sample.token_ids))) == sample.token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_7_text_has_the_ids_of_the_whole(name):
    """Strings: BOS once, no space of the tokenizer's own before the answer, and the end token."""
    encoder = encoder_of(name)
    own, bare = encoder.tokenizer("A:\n").input_ids, ids_of(encoder, "A:\n")
    assert encoder.prompt("A:\n") == own
    row = encoder.row({"prompt": "A:\n", "completion": "4 4", "negatives": ["yes."]})
    for text, found in (("4 4", row["completion_ids"]), ("yes.", row["negative_ids"][0])):
        assert found == [*ids_of(encoder, "A:\n" + text)[len(bare) :], encoder.turns.end_for("")]
    assert encoder.truncation.apart == 0
    bos = FAMILIES[name].bos
    assert bos is None or encoder.prompt(bos + "A:\n") == own  # not twice


def test_a_token_across_the_boundary_is_counted():
    """A prompt that ends in a space: the whole text would join it with the answer, which no model could write."""
    encoder = Encoder(tokenizer_of(FAMILIES["zephyr"]))
    ids = encoder.completion("A: ", "yes.")
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[0].startswith("y")
    assert encoder.truncation.apart == 1 and "1 answers would share a token" in encoder.cuts()


def test_a_cut_prompt_keeps_how_every_text_begins():
    encoder = Encoder(encoder_of("gemma 3").tokenizer, max_prompt_length=5)
    ids = encoder.prompt("one two three four five six seven")
    whole = encoder.tokenizer("one two three four five six seven").input_ids
    assert ids == [encoder.tokenizer.bos_token_id, *whole[-4:]]


def test_16_reasoning_is_kept_where_the_template_keeps_it():
    thought = said("<think>\nhm\n</think>\n\n4")
    encoder = encoder_of("qwen 3")
    row = encoder.row({"prompt": USER, "completion": thought, "negatives": ["5"]})
    decoded = [encoder.tokenizer.decode(row[key]) for key in ("prompt_ids", "completion_ids")]
    assert decoded == [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nhm\n</think>\n\n4<|im_end|>",
    ]
    assert encoder.prompt(USER, thinking=True) == row["prompt_ids"]
    with pytest.raises(UserError, match="a negative contains reasoning"):
        encoder.row({"prompt": USER, "completion": said("4"), "negatives": [thought]})
    with pytest.raises(UserError, match="template drops the reasoning.*model.chat_template"):
        encoder_of("deepseek r1").row({"prompt": USER, "completion": thought})


def test_16_only_end_tokens_end_an_answer():
    """Other special tokens inside an answer stay; at an end token sampling would stop, so the answer is cut there."""
    family = Family("byte", CHATML + CHATML_ASKS, "", "", "", eos="<eos>", special=("<tool>",), added=("<|im_end|>",))
    encoder = Encoder(tokenizer_of(family))
    decode = encoder.tokenizer.decode
    assert decode(encoder.completion(USER, said("call <tool> now please"))) == "call <tool> now please<|im_end|>"
    assert encoder.cuts() is None
    assert decode(encoder.completion(USER, said("say <eos> twice"))) == "say <eos>"
    assert encoder.cuts() == "1 answers have an end token inside their text and are cut there, as in sampling"
    assert decode(encoder.completion("a", "4<eos>")) == "4<eos>"
    assert encoder.truncation.ended == 1


def test_without_any_end_token_the_tokenizer_is_refused():
    family = Family("byte", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "", "", "")
    with pytest.raises(UserError, match="no token ends an answer.*tokenizer.eos_token"):
        Encoder(tokenizer_of(family))
    tokenizer = tokenizer_of(Family("byte", None, "", "", "", special=("<stop>",)))
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    encoder = Encoder(tokenizer, model_end_ids=[stop, tokenizer.convert_tokens_to_ids("a"), 10**6])
    assert encoder.end_ids == [stop]  # neither an ordinary letter nor an id that does not exist
    assert encoder.completion(USER, said("4"))[-1] == stop
