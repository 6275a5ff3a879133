"""What generate writes: wrong answers alone where they can be checked, after solved rows, by another writer."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowdft.cli import main
from lowdft.config.recipe import load_recipe
from lowdft.config.sections import NegativesSection
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import generate
from lowdft.sampling import Sample


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    rows = [{"prompt": f"{a}+{a} =", "completion": f" {2 * a}"} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 3, prompt_style: direct}}\n"
        "adapter: {r: 2}\n"
        "negatives: {max_new_tokens: 6, batch_size: 4, strategy: direct}\n"
        "training: {per_device_train_batch_size: 4, num_train_epochs: 1, use_cpu: true}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    return str(tmp_path / "recipe.yaml")


class Writer:
    """A sampler that says what it is told, one list of texts a call."""

    def __init__(self, run, *calls):
        self.run, self.calls = run, list(calls)

    def sample(self, requests):
        texts = self.calls.pop(0)
        assert len(texts) == len(requests)
        ids = [self.run.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [Sample([*one, self.run.tokenizer.eos_token_id], "stop") for one in ids]


def written(recipe, number, *calls, **overrides):
    run = Run(load_recipe(recipe, ["negatives.keep=wrong", *(f"negatives.{k}={v}" for k, v in overrides.items())]))
    return generate.write_negatives(run, Writer(run, *calls), run.examples("train")[3:4], number)[0]


def test_right_answers_are_drawn_again(recipe):
    """3+3 = 6: "6" and "06.0" are right, so both are replaced; what was right at first is counted."""
    row = written(recipe, 3, ["6", "7", "06.0"], ["8", "6"], ["9"], resample=2)
    assert row["negatives"] == ["8", "7", "9"]
    assert (row["right_at_first"], row["replaced"], row["stand_ins"]) == (2, 0, 0)


def test_right_answers_that_are_left_give_way_to_the_rows_wrong_ones(recipe):
    row = written(recipe, 4, ["6", "7", "6", "8"])
    assert row["negatives"] == ["7", "7", "8", "8"] and row["negative_ids"][0] == row["negative_ids"][1]
    assert (row["right_at_first"], row["replaced"], row["stand_ins"]) == (2, 2, 0)


def test_another_rows_completion_stands_in_where_all_are_right(recipe):
    """It is none that would be right here, and it has the ids of a completion."""
    row = written(recipe, 2, ["6", "6"])
    assert row["stand_ins"] == 2 and row["negatives"][0] == row["negatives"][1] != "6"
    run = Run(load_recipe(recipe, []))
    completions = {e.completion.strip(): run.encoder.completion(e.prompt, e.completion) for e in run.examples("train")}
    assert row["negative_ids"][0] == completions[row["negatives"][0]]
    table = pa.Table.from_pylist([row])
    found = generate.count(table)
    assert (found["right_at_first"], found["wrong_ones_used_again"], found["completions_of_other_rows"]) == (2, 0, 2)


def test_answers_that_cannot_be_checked_cannot_be_kept_wrong(recipe, capsys):
    assert main(["generate", recipe, "negatives.keep=wrong", "evaluation.answer=none"]) == 1
    assert "negatives.keep is wrong, but evaluation.answer is none; wanted one of" in capsys.readouterr().err
    with pytest.raises(UserError, match="Known are: all, wrong"):
        load_recipe(recipe, ["negatives.keep=right"])


def test_few_shot(recipe, capsys):
    """Held-out rows are asked after training rows too; a negative ends at the first line break."""
    more = ["negatives.strategy=few_shot", "negatives.shots=2"]
    assert main(["generate", recipe, *more]) == 0
    run = Run(load_recipe(recipe, more))
    trained = {e.prompt for e in run.examples("train")}
    for split in ("train", "heldout"):
        example = run.examples(split)[0]
        *shots, own = run.tokenizer.decode(run.sampling_ids(example)).split("\n\n")
        assert own == example.prompt and len(shots) == 2
        assert all(shot.split("=")[0] + "=" in trained - {example.prompt} for shot in shots)
    found = pq.read_table(run.negatives("train").path).to_pylist()
    assert not any("\n" in negative for row in found for negative in row["negatives"])
    assert main(["generate", recipe, *more[:1], "negatives.shots=3"]) == 1
    assert "shots was 2, is now 3" in capsys.readouterr().err


def test_warning_of_another_form():
    """Two of three negatives are far longer than their completion."""
    row = {"completion": "4", "negatives": ["5", "Well, let us see now.", "The answer\nis 4"], "finish_reasons": []}
    facts = generate.count(pa.Table.from_pylist([row | {"finish_reasons": ["stop"] * 3}]))
    assert facts["of_another_form"] == 2
    assert generate.form_warning(facts).startswith("2 of 3 negatives have a different form than their completion")
    assert generate.form_warning(facts | {"of_another_form": 1}) is None


def test_a_trained_copy_writes(recipe, tmp_path):
    """SFT first; its adapter then writes the next training's negatives, while reference and start are the base."""
    sft = ["training.objective=sft", "training.learning_rate=0.05", f"output_dir={tmp_path}/sft"]
    assert main(["train", recipe, *sft]) == 0
    texts = []
    for name, more in (("base", []), ("copy", [f"negatives.adapter={tmp_path}/sft/adapter"])):
        own = [f"output_dir={tmp_path}/{name}", "negatives.temperature=0", "training.objective=listwise", *more]
        for stage in ("generate", "train"):
            assert main([stage, recipe, *own]) == 0
        texts.append(pq.read_table(tmp_path / name / "negatives.parquet")["negatives"].to_pylist())
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "backend, given, samples",
    [("vllm", 32, 8192), ("continuous", 32, 128), ("continuous", 512, 1024), ("padded", 32, 64)],
)
def test_memory_engines_with_a_scheduler_of_their_own_get_large_parts(backend, given, samples):
    """Small ones would run dry at the end of each of tens of thousands."""
    assert generate.samples_per_part(NegativesSection(backend=backend, batch_size=given)) == samples


def test_20_negatives_that_mostly_hit_the_length_cap_are_warned_of():
    warning = generate.mostly_cut({"negatives": 512, "cut_at_max_new_tokens": 473}, 320)
    assert warning.startswith("473 of 512 negatives were cut at negatives.max_new_tokens=320")
    assert generate.mostly_cut({"negatives": 512, "cut_at_max_new_tokens": 256}, 320) is None
    assert generate.mostly_cut({"negatives": 0, "cut_at_max_new_tokens": 0}, 320) is None
