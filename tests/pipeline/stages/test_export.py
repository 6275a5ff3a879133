"""export: a real adapter on a tiny model becomes publishable, loads with plain peft, and leaves only when told to."""

from __future__ import annotations

import json
import re
import shutil

import peft
import pytest
import torch
import yaml
from helpers import write_benchmark
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowdft import models
from lowdft.config.sections import AdapterSection, DataSection, ModelSection, Recipe
from lowdft.errors import UserError
from lowdft.pipeline import hub
from lowdft.pipeline.context import Run
from lowdft.pipeline.publishable import clean
from lowdft.pipeline.stages import export
from lowdft.reporting import markdown, model_card


def make_run(folder, base, adapter: bool = True, hub_id: str | None = "someone/tiny-llama", **training) -> Run:
    """A run of four rows with a real product, as the train stage leaves it, that was never trained."""
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"{i} or {i + 1}?", "completion": f"{i + 1}"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(Recipe(
        output_dir=str(folder / "first"),
        model=ModelSection(name_or_path=str(base), hub_id=hub_id, load_in_4bit=False, dtype="float32"),
        adapter=AdapterSection(r=4, alpha=8) if adapter else None,
        data=DataSection(train=str(data), eval_rows=2),
        training={"num_train_epochs": 2, "max_length": 256, "max_prompt_length": 128, "use_cpu": True, **training},
    ))  # fmt: skip
    run.check()
    run.training.begin()
    model = run.base()
    if adapter:
        model = models.add_adapter(model, run.recipe.adapter, seed=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(run.training.path)
    run.tokenizer.save_pretrained(run.training.path)
    (run.training.path / "README.md").unlink(missing_ok=True)  # peft's; the train stage drops it too
    (run.training.path / "training_args.bin").write_bytes(b"a pickle that names /home/someone/runs")
    run.training.finish(steps=2, seconds=1.0)
    run.negatives("train").finish(rows=4, seconds=7.5, negatives=16, empty=3)
    return run


def evaluate(run: Run) -> None:
    run.evaluation.begin()
    base = {"margin": 8.9, "accuracy": 0.255, "accuracy_stderr": 0.02}
    systems = {"base": base, "after": {"margin": 56.85, "accuracy": 1.0}}
    (run.folder / "evaluation.json").write_text(json.dumps({"rows": 2, "negatives_per_row": 2, "systems": systems}))
    run.evaluation.finish(rows=2)


def readme(run: Run) -> str:
    return (run.training.path / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def pushed(monkeypatch):
    """What would have left this machine: (name, private, {file: size}) of every push."""
    calls = []

    def push(files, name, private, kind="model"):
        calls.append((name, private, {file.name: file.size for file in files}))
        return f"https://hub/{name}"

    monkeypatch.setattr(hub, "push", push)
    return calls


def test_the_exported_adapter_loads_with_plain_peft(tmp_path, tiny_folder, pushed):
    run = make_run(tmp_path, tiny_folder)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(tiny_folder)(ids).logits
        before = models.load_adapter(run.base(), run.training.path)(ids).logits
        export.main(run)
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        after = peft.PeftModel.from_pretrained(base, run.training.path)(ids).logits
    assert torch.equal(before, after)
    assert (after - bare).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(run.training.path)
    assert tokenizer("9.9").input_ids == run.tokenizer("9.9").input_ids
    assert tokenizer.chat_template == run.tokenizer.chat_template
    assert pushed == []  # nothing leaves unless told to


def test_configuration_names_the_base_and_never_a_path(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.source = models.Source(str(tiny_folder), "0123abc", run.source.identity, False)
    run.training.begin()
    run.training.finish(steps=2)
    folder = run.training.path
    assert str(tiny_folder) in (folder / "adapter_config.json").read_text()  # as peft wrote it
    export.main(run)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny-llama", "0123abc")
    assert config["r"] == 4
    assert not (folder / "training_args.bin").exists()
    for path in folder.rglob("*"):
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    assert "is_local" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert 'from_pretrained("someone/tiny-llama", revision="0123abc", dtype=torch.float32)' in readme(run)


def test_card(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # which package that is, its own metadata do not say
    run = make_run(tmp_path, tiny_folder)
    evaluate(run)
    export.main(run)
    text, data = readme(run), ModelCard.load(run.training.path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("peft", "text-generation", "someone/tiny-llama")
    assert set(data.tags) == {"lora", "transformers", "dft", "discriminative-fine-tuning", "lowdft", "arxiv:2502.18679",
                              "base_model:adapter:someone/tiny-llama"}  # fmt: skip
    assert data.license is None and data.datasets is None
    for wanted in [
        "`-log P(y|x) + tau * log u(x)`",
        "dense float32",
        f"local copy ({run.source.identity})",
        'model = PeftModel.from_pretrained(base, "',
        "4 rows of a local file; 2 rows held out.",
        "strategy `bad_system` (`You are an unhelpful assistant.`), temperature 0.7, top_p 1, top_k 50",
        "Counted: 4 rows, 16 negatives, 3 empty.",
        "| gamma | `0.85` |",
        "| steps | `2` |",
        "| lora alpha | `8` |",
        "| accuracy of greedy answers | 25.5 ± 2.0% | 100.0% |",
        "| margin, nats | 8.90 | 56.85 |",
        f"torch {torch.__version__}",
        "**Discriminative Fine-Tuning**",
        "not *Dynamic* Fine-Tuning",
        "Siqi Guo and Ilgee Hong and Vicente Balmaseda",
        "The licence of the base applies",
    ]:
        assert wanted in text, wanted
    assert str(tmp_path) not in text and "bitsandbytes" not in text


def test_card_of_another_objective_without_evaluation(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, objective="sft")
    export.main(run)
    text = readme(run)
    assert "Objective: `sft` (maximum likelihood)." in text and "No negatives." in text
    assert "## Evaluation" not in text and "| tau |" not in text and "negatives_per_step" not in text


def test_a_local_base_goes_by_its_bare_name(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder, hub_id=None)
    export.main(run)
    data = ModelCard.load(run.training.path / "README.md").data
    config = json.loads((run.training.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_folder.name
    assert data.base_model is None and not any(tag.startswith("base_model") for tag in data.tags)
    assert f"`{tiny_folder.name}` (a local model)" in readme(run)


def test_full_parameters(tmp_path, tiny_folder, pushed):
    run = make_run(tmp_path, tiny_folder, adapter=False)
    config = run.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tiny_folder)}))
    run.training.finish(steps=2, seconds=1.0)
    export.main(run, push="me/tiny-dft")
    assert "_name_or_path" not in json.loads(config.read_text())
    data = ModelCard.load(run.folder / "model" / "README.md").data
    assert data.library_name == "transformers" and "lora" not in data.tags
    assert "PeftModel" not in readme(run) and "full-parameter fine-tune" in readme(run)
    assert AutoModelForCausalLM.from_pretrained(run.folder / "model").config.hidden_size == 32
    assert {"model.safetensors", "config.json", "generation_config.json"} <= set(pushed[0][2])


def test_data_of_the_hub_is_named(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.recipe.data.train = "openai/gsm8k:main"
    card = model_card.card(run)
    assert card.data.datasets == ["openai/gsm8k"]
    assert "4 rows of `openai/gsm8k:main` (split `train`)" in str(card)
    for other in ("toy:bigger-number?n=8", "data/rows.jsonl", str(tmp_path / "rows.jsonl")):
        run.recipe.data.train = other
        assert model_card.card(run).data.datasets is None


def cleaned(run: Run) -> Run:
    """The product as the train stage notes it, whose configuration files export will not change."""
    clean(run.training.path, models.public_name(run.source, run.recipe.model), run.source.revision)
    run.training.finish(steps=2, seconds=1.0)
    return run


def test_nothing_leaves_without_a_name_on_the_command_line(tmp_path, tiny_folder, pushed, said):
    run = cleaned(make_run(tmp_path, tiny_folder))
    run.recipe.export.push = "me/from-recipe"
    export.main(run)
    told = said()
    assert pushed == [] and f"lowdft export {run.folder} --push me/from-recipe" in told
    assert f"lowdft chat {run.folder}" in told
    (run.training.path / ".env").write_text("KEY=1")
    (run.training.path / "notes.md").write_text("mine")
    export.main(run, push="me/tiny-dft")
    [(name, private, files)] = pushed
    assert (name, private) == ("me/tiny-dft", True)
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    out = said()
    assert "not uploaded: .env, notes.md" in out and "adapter_model.safetensors\n" in out
    assert 'PeftModel.from_pretrained(base, "me/tiny-dft")' in readme(run)


def test_dry_run_shows_everything_and_writes_nothing(tmp_path, tiny_folder, pushed, said):
    run = make_run(tmp_path, tiny_folder)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    export.main(run, push="me/tiny-dft", dry_run=True)
    out = said()
    assert "--push me/tiny-dft would upload:" in out
    assert pushed == [] and before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert "adapter_model.safetensors" in out and "## Loading" in out and "not uploaded: training_args.bin" in out
    assert "missing: the licence" in out and "missing: an evaluation" in out and "missing: benchmarks" in out


def test_licence_language_and_results_are_in_the_hubs_form(tmp_path, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage:\n- en\n---\n")
    run = make_run(tmp_path, base)
    write_benchmark(run.folder)
    export.main(run)
    data = ModelCard.load(run.training.path / "README.md").data
    assert (data.license, data.license_name, data.language) == ("other", "tiny", ["en"])
    assert "The base's licence is `other`" in readme(run)
    assert "exact\\_match | 25.00 | 37.50 | \\+12.50 |" in readme(run)
    [entry] = parse_eval_result_entries(yaml.safe_load((run.training.path / export.RESULTS).read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 37.5)
    assert export.RESULTS in [file.name for file in hub.select(run.training.path)[0]]
    run.recipe.model.license = "apache-2.0"
    assert model_card.card(run).data.license == "apache-2.0"


def test_loading_as_it_was_trained(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.recipe.model.load_in_4bit, run.recipe.model.dtype = True, "bfloat16"
    text = str(model_card.card(run, "me/tiny"))
    assert 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True' in text and "quantization_config=nf4)" in text
    assert "dtype=torch.bfloat16)" in text and 'messages = [{"role": "user"' in text
    for snippet in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
        compile(snippet, "card", "exec")


def test_markup_from_users_stays_text(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.recipe.negatives.system_prompt = "Be ``bad`` <img src=x onerror=alert(1)>\n\n# now"
    run.recipe.data.system_prompt = "```\n<script>"
    text = str(model_card.card(run))
    assert "```Be ``bad`` <img src=x onerror=alert(1)> # now```" in text  # code, in more backticks than it has
    assert "````python" in text
    assert markdown.plain("a <b> [c](d) | `e`") == "a \\<b\\> \\[c\\]\\(d\\) \\| \\`e\\`"


def test_a_local_path_stops_the_push_and_its_place_is_named(tmp_path, tiny_folder, said):
    run = cleaned(make_run(tmp_path, tiny_folder))
    path = run.training.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eva_config": {"cache": ["/home/someone/cache"]}}))
    run.training.finish(steps=2, seconds=1.0)
    with pytest.raises(UserError, match="not pushed.*adapter_config.json: eva_config.cache.0 has a local path"):
        export.main(run, push="me/tiny-dft")
    export.main(run)  # without a push it is only reported
    assert "warning" in said()
    path.write_text(path.read_text().replace("/home/someone/cache", "elsewhere"))
    run.recipe.negatives.system_prompt = "Read /home/someone/notes.txt first."
    run.training.finish()
    with pytest.raises(UserError, match=r"README.md:\d+ has a local path"):
        export.main(run, push="me/tiny-dft")


def test_a_merged_model_needs_a_merge(tmp_path, tiny_folder, pushed):
    run = make_run(tmp_path, tiny_folder)
    with pytest.raises(UserError, match="no merged model; run `lowdft merge"):
        export.main(run, merged="bf16")
    shutil.copytree(tiny_folder, run.folder / "merged-bf16")
    export.main(run, push="me/merged", merged="bf16")
    assert "model.safetensors" in pushed[0][2] and "adapter_config.json" not in pushed[0][2]
    text = (run.folder / "merged-bf16" / "README.md").read_text()
    assert "A LoRA adapter merged into" in text and 'AutoModelForCausalLM.from_pretrained("me/merged"' in text


def test_nothing_trained_is_told(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.training.begin()
    with pytest.raises(UserError, match="run `lowdft train RECIPE` first"):
        export.main(run)
