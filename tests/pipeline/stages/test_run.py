"""The whole way on a tiny model: every product, resuming, skipping and refusing in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROWS, folder, interrupt, metrics
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowdft.cli import main
from lowdft.config.recipe import load_recipe
from lowdft.pipeline.context import Run


@pytest.mark.parametrize("objective", ["dft", "dft2", "sft"])
def test_whole_way(recipe, objective, tiny_folder, capsys):
    """Every product stands in the run folder; the adapter loads with plain peft and is the one that was trained."""
    assert main(["run", recipe, f"training.objective={objective}"]) == 0
    run = folder(recipe)
    names = {path.name for path in run.iterdir()}
    wanted = {"recipe.yaml", "heldout_negatives.parquet", "metrics.jsonl", "adapter", "evaluation.json", "report.html"}
    wanted |= {"dft": {"negatives.parquet", "reference.parquet"}, "dft2": {"negatives.parquet"}, "sft": set()}[
        objective
    ]
    assert wanted <= names
    assert ("reference.parquet" in names) == (objective == "dft")
    assert len(metrics(recipe, ("step", "loss"))) == 6
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["rows"] == 3 and set(evaluation["systems"]) == {"base", "after"}
    assert evaluation["systems"]["after"]["logps/positive"] != evaluation["systems"]["base"]["logps/positive"]
    assert "accuracy" in evaluation["systems"]["after"]  # "4" is a number, so answers can be checked
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = AutoTokenizer.from_pretrained(run / "adapter")("2+2?", return_tensors="pt").input_ids
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run / "adapter")(ids).logits
    assert (adapted - before).abs().max() > 1e-6
    if objective == "dft":
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert first["reference/gap"] < 1e-4


def test_second_run_skips_what_is_done(recipe, capsys):
    assert main(["run", recipe]) == 0
    stamps = {p: p.stat().st_mtime_ns for p in folder(recipe).glob("*.parquet")}
    capsys.readouterr()
    assert main(["run", recipe]) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    out = capsys.readouterr().out
    assert "negatives.parquet: already exists" in out and "already trained" in out and "already measured" in out


def test_other_settings_are_refused_in_words(recipe, capsys):
    assert main(["generate", recipe]) == 0
    assert main(["generate", recipe, "negatives.temperature=1.5"]) == 1
    error = capsys.readouterr().err
    assert "negatives.parquet was made with other settings (negatives.temperature was 0.7, is now 1.5)" in error
    assert "Traceback" not in error


def test_checkpoints_without_a_manifest_are_refused(recipe, capsys):
    """As after deleting the adapter to train with other settings: the old checkpoints would be gone on from."""
    assert main(["run", recipe]) == 0
    shutil.rmtree(folder(recipe) / "adapter")
    (folder(recipe) / "adapter.manifest.json").unlink()
    assert main(["train", recipe, "training.learning_rate=1e-3"]) == 1
    assert "checkpoint-6: cannot resume, because adapter.manifest.json is missing" in capsys.readouterr().err


def test_killed_training_goes_on_with_the_same_numbers(recipe, monkeypatch):
    """Interrupted after two of six steps; metrics.jsonl ends line for line as without the interruption."""
    assert main(["run", recipe]) == 0
    whole = metrics(recipe)
    for path in ["adapter", "checkpoints"]:
        shutil.rmtree(folder(recipe) / path)
    for path in ["adapter.manifest.json", "metrics.jsonl"]:
        (folder(recipe) / path).unlink()
    from lowdft.training.log_u import LogU

    interrupt(monkeypatch, LogU, "update", call=4)
    assert main(["train", recipe]) == 130
    assert len(metrics(recipe)) == 3
    shutil.rmtree(folder(recipe) / "checkpoints" / "checkpoint-3")  # as if the third had not been written yet
    assert main(["train", recipe]) == 0
    assert metrics(recipe) == whole


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.train=absent.jsonl"], "absent.jsonl"),
        (["model.name_or_path=/no/such/folder"], "model.name_or_path is '/no/such/folder': there is no such folder"),
        (["model.name_or_path=nobody/nothing", "model.hub_id=null"], "with no network, download it elsewhere"),
        (["model.name_or_path=package:no_such_package/x.gguf"], "the Python package no_such_package is not installed"),
        (["negatives.per_prompt=1"], "negatives.per_prompt is 1; training.negatives_per_step=2 requires"),
        (["negatives.source=data"], "have too few negatives (the fewest: 0); training.negatives_per_step=2"),
        (["data.eval_rows=12"], "data.eval_rows is 12, but data.train has 12 rows"),
        (
            ["training.per_device_train_batch_size=16", "training.dataloader_drop_last=true"],
            "9 rows do not fill one optimizer step of 16",
        ),
        (["training.nonsense=1"], "training.nonsense is not known"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(recipe, overrides, words, capsys, monkeypatch):
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, *overrides]) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_steps_out_of_order_say_which_comes_first(recipe, capsys):
    assert main(["train", recipe]) == 1
    assert "run `lowdft generate RECIPE` first" in capsys.readouterr().err
    assert main(["generate", recipe]) == 0
    assert main(["train", recipe]) == 1
    assert "run `lowdft score RECIPE` first" in capsys.readouterr().err


def test_bad_rows_all_in_one_go_and_skip_invalid(recipe, capsys):
    rows = Path(recipe).parent / "rows.jsonl"
    bad = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " "}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *bad]))
    assert main(["generate", recipe]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:13" in error and "rows.jsonl:14" in error
    assert main(["generate", recipe, "--skip-invalid"]) == 0
    assert "2 of 14 rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["training", "sampling", "proposal"])
def test_reference_prompts(recipe, prompt):
    """sampling and proposal condition on the unhelpful prompt; a proposal's density is at most cut and sharpened."""
    overrides = [f"training.reference_prompt={prompt}", "negatives.temperature=1.0", "negatives.top_k=0"]
    assert main(["generate", recipe, *overrides]) == 0
    assert main(["score", recipe, *overrides]) == 0
    run = Run(load_recipe(recipe, overrides))
    scored = pq.read_table(folder(recipe) / "reference.parquet").to_pylist()
    row, found = run.encoded("train")[0], scored[0]["ref_negative_logps"]
    from lowdft.logprobs import Group, score

    ids = row["prompt_ids"] if prompt == "training" else row["sampling_prompt_ids"]
    wanted = score(run.base(), [Group(ids, row["negative_ids"])]).logps_C
    assert found == pytest.approx(wanted.tolist(), abs=1e-3)  # at temperature 1 without cuts the proposal is the model
    assert (row.get("sampling_prompt_ids") != row["prompt_ids"]) or prompt == "training"


def test_full_parameters(recipe):
    """adapter: null trains all parameters; the reference was scored by the weights before the first step."""
    assert main(["run", recipe, "adapter=null", "training.learning_rate=1e-3"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder(recipe) / "model")
    assert sum(p.numel() for p in model.parameters()) > 0
    evaluation = json.loads((folder(recipe) / "evaluation.json").read_text())["systems"]
    assert evaluation["after"]["logps/positive"] > evaluation["base"]["logps/positive"]


def test_compare_stands_side_by_side(recipe, capsys):
    assert main(["run", recipe, "training.objective=sft"]) == 0
    shutil.move(folder(recipe), f"{folder(recipe)}_sft")
    assert main(["run", recipe, f"evaluation.compare={{sft: {folder(recipe)}_sft}}"]) == 0
    systems = json.loads((folder(recipe) / "evaluation.json").read_text())["systems"]
    assert list(systems) == ["base", "after", "sft"]
    assert len({s["logps/positive"] for s in systems.values()}) == 3


def test_wrong_command_line_is_2(recipe):
    with pytest.raises(SystemExit) as stopped:
        main(["trian", recipe])
    assert stopped.value.code == 2


def test_sft_then_preference(recipe, tmp_path):
    """The second recipe's reference is base + first adapter: at step 0 DPO is log 2, precomputed and online alike."""
    assert main(["train", recipe, "training.objective=sft", "training.learning_rate=0.05"]) == 0
    first = folder(recipe) / "adapter"
    found = {}
    for reference in ("precomputed", "online"):
        more = [f"output_dir={tmp_path}/{reference}", "training.objective=dpo", f"training.reference={reference}"]
        more += [f"training.reference_model=adapter:{first}", "training.logging_steps=1"]
        for verb in ("generate", "score", "train"):
            assert main([verb, recipe, *more]) == 0
        lines = [json.loads(line) for line in (tmp_path / reference / "metrics.jsonl").read_text().splitlines()]
        found[reference] = [line["loss"] for line in lines]
        assert found[reference][0] == pytest.approx(0.6931, abs=1e-3)
        assert not (tmp_path / reference / "adapter" / "reference").exists()
    assert found["online"] == pytest.approx(found["precomputed"], rel=1e-4)
    start = load_file(first / "adapter_model.safetensors")
    end = load_file(tmp_path / "online" / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in start.items() if "lora_B" in name)
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)


def test_wrong_references_are_told(recipe, tmp_path, capsys):
    assert main(["train", recipe, f"training.reference_model=adapter:{tmp_path}"]) == 1
    assert "not a trained adapter" in capsys.readouterr().err
    assert main(["train", recipe, "training.reference_model=adapter:x", "adapter=null"]) == 1
    assert "but `adapter: null` trains all parameters" in capsys.readouterr().err
    assert main(["train", recipe, "training.reference_model=somewhere"]) == 1
    assert "base or adapter:PATH" in capsys.readouterr().err


def test_extrapolation_scales_the_adapters_change(recipe, tiny_folder):
    """Logits of base + (1 + a) B A: weights merged by hand from the trained adapter, against the exported one."""
    for verb in ("generate", "score", "train"):
        assert main([verb, recipe, "training.learning_rate=0.05"]) == 0
    assert main(["export", recipe, "training.learning_rate=0.05", "--extrapolate", "0.5"]) == 0
    target = folder(recipe) / "adapter-extrapolated"
    ids = torch.tensor([[5, 6, 7]])

    def merged(path) -> AutoModelForCausalLM:
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        return PeftModel.from_pretrained(base, path).merge_and_unload()

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    trained, found = merged(folder(recipe) / "adapter"), merged(target)
    with torch.no_grad():
        for start, end in zip(base.parameters(), trained.parameters(), strict=True):
            end.add_(0.5 * (end - start))
        torch.testing.assert_close(found(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
    assert "scaled by 1.5" in (target / "README.md").read_text()


def test_rounds(recipe, tmp_path):
    """Two rounds: the second's negatives are other ones, its reference and start are the first's adapter; resumable."""
    more = ["rounds=2", "training.learning_rate=0.05", "negatives.temperature=0", "training.freeze_half=true"]
    assert main(["run", recipe, *more]) == 0
    first, second = (folder(recipe) / f"round-{n}" for n in (1, 2))
    texts = [pq.read_table(path / "negatives.parquet")["negatives"].to_pylist() for path in (first, second)]
    assert texts[0] != texts[1]  # greedy, so only another model writes other ones
    held = [(path / "heldout_negatives.parquet.manifest.json").read_text() for path in (first, second)]
    assert '"negatives.adapter": null' in held[1]
    line = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])
    assert line["weights/mean"] == pytest.approx(1.0, abs=1e-3) and line["reference/gap"] < 1e-3
    weights = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (first, second)]
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert 0 < len(moved) < len(weights[0])
    before = (second / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(["run", recipe, *more]) == 0
    assert (second / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_rounds_need_an_adapter(recipe, capsys):
    assert main(["run", recipe, "rounds=2", "adapter=null"]) == 1
    assert "adapter" in capsys.readouterr().err
