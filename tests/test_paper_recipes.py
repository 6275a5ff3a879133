"""The recipes that rerun the paper: all parse with the paper's settings, and their plans say what they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT, make_tokenizer, needs_bfloat16

from lowdft.cli import main
from lowdft.config.recipe import load_recipe, training_config

PAPER = ROOT / "recipes" / "paper"
MISTRAL_7B = {  # the shape of Mistral-7B-v0.1, as its config.json has it
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """A folder with Mistral-7B's configuration, a small tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("mistral-7b")
    make_tokenizer(None).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
    return folder


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda p: p.stem)
def test_settings_are_the_papers(path):
    """128 prompts a step, B and epochs and learning rates of Tables 5 and 6; ten times the rate for an adapter."""
    recipe = load_recipe(path)
    args = training_config(recipe)
    mathematics, adapter = "metamath" in path.stem, recipe.adapter is not None
    gpus = 1 if adapter or "qwen" in path.stem else 4  # dtype auto is the machine's
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 128
    after_sft = args.objective in ("dpo", "simpo")  # one epoch from the SFT adapter: Table 4
    assert (args.negatives_per_step, args.num_train_epochs) == ((4, 3) if mathematics else (2, 1 if after_sft else 2))
    assert args.learning_rate == {(0, 0): 2e-6, (0, 1): 2e-5, (1, 0): 8e-7, (1, 1): 1e-5}[mathematics, adapter]
    if after_sft:
        assert args.reference_adapter == "runs/paper/ultrafeedback-sft/adapter"
    else:
        assert (args.objective, args.tau, args.gamma) == ("dft", 1.0, 0.95 if mathematics else 0.85)
    assert (args.max_length, args.max_prompt_length) == (512 if mathematics else 1024, 512)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("cosine", 0.1)
    sampling = recipe.negatives
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 1.0, 50)
    assert sampling.max_new_tokens == (256 if mathematics else 320)
    assert recipe.model.revision and adapter == recipe.model.load_in_4bit


def local(model: Path, data: str) -> list[str]:
    """Overrides that put a local model and local rows in the place of the Hub's."""
    return [f"model.name_or_path={model}", "model.revision=null", f"data.train={data}", "data.eval=null",
            "data.eval_rows=null"]  # fmt: skip


def rows(path: Path, query: str, response: str) -> str:
    lines = [json.dumps({query: f"{n} + 1?", response: f"It is {n + 1}. " + "So it is. " * 20}) for n in range(256)]
    path.write_text("\n".join(lines))
    return str(path)


def plan(name: str, gpu: int, folder: Path, overrides: list[str]) -> list[str]:
    return ["plan", str(PAPER / name), f"output_dir={folder}", *overrides, "--gpu", str(gpu)]


@needs_bfloat16
def test_plan_over_four_gpus(mistral, tmp_path, capsys):
    """16 bytes a weight in four parts (7.24 billion: 29 GB), and what is gathered and passed on top; fits 80 GB."""
    data = rows(tmp_path / "rows.jsonl", "prompt", "completion")
    command = plan("ultrafeedback.yaml", 80, tmp_path, local(mistral, data))
    assert main([*command, "--gpus", "4"]) == 0
    out = capsys.readouterr().out
    parts = {
        name.strip(): float(value)
        for name, value in (line.strip(" │┃").split("│") for line in out.splitlines() if line.count("│") == 3)
    }
    assert parts["weights"] == parts["gradients"] == pytest.approx(7.24 * 2 / 4, abs=0.01)
    assert parts["optimizer"] == 2 * parts["float32 copy of the weights"] == pytest.approx(7.24 * 8 / 4, abs=0.01)
    assert parts["layers gathered whole"] == 2.0
    assert 32 < parts["total (estimate)"] < 60
    out = " ".join(out.split())  # a table wraps its title
    assert "of each of 4 GPUs" in out and "fits 80 GB" in out
    assert "1,024 negatives of up to 320 tokens to write" in out and "4 steps" in out and "warning" not in out
    assert main(command) == 0
    alone = capsys.readouterr().out
    assert "does not fit 80 GB" in alone


def test_plan_of_the_qlora_twin(mistral, tmp_path, capsys):
    data = rows(tmp_path / "rows.jsonl", "query", "response")
    command = plan("metamathqa-qlora.yaml", 24, tmp_path, local(mistral, data))
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "layout: query+response" in out and "fits 24 GB" in out
    assert "3,072 negatives of up to 256 tokens to write" in out and "6 steps" in out


def test_the_authors_columns_and_template(mistral, tmp_path):
    """Their rows (`real`, `generated_0`, …, whole conversations); the header is the prompt's, and one token ends it."""
    from lowdft.pipeline.context import Run

    def said(text):
        return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": text}]

    row = {"real": said("Yes."), **{f"generated_{i}": said(f"No {i}.") for i in range(8)}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    overrides = [*local(mistral, f"{tmp_path}/rows.jsonl"), f"output_dir={tmp_path}"]
    run = Run(load_recipe(PAPER / "ultrafeedback-authors.yaml", overrides))
    run.check()
    (encoded,) = run.encoded("train")
    text = run.tokenizer.decode
    assert run.ready_negatives() and len(encoded["negative_ids"]) == 8
    prompt = "<|im_start|><|user|>\nHi?<|im_end|>\n<|assistant|>\n"  # with this tokenizer's start and end tokens
    assert text(encoded["prompt_ids"]) == prompt
    assert text(encoded["completion_ids"]) == "Yes.<|im_end|>"
    assert text(encoded["negative_ids"][7]) == "No 7.<|im_end|>"
