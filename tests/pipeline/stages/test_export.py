"""export: a real adapter on a tiny model becomes publishable, loads with plain peft, and leaves only when told to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowdft import models
from lowdft.config.sections import AdapterSection, DataSection, ModelSection, Recipe
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import export


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
def hub(monkeypatch):
    """A Hub that notes what would have left the machine."""
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs["repo_id"], sorted(p.name for p in kwargs["folder_path"].iterdir())))

    monkeypatch.setattr(export, "HfApi", FakeApi)
    return calls


def test_the_exported_adapter_loads_with_plain_peft(tmp_path, tiny_folder, hub):
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
    assert hub == []  # nothing leaves unless told to


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
    assert 'from_pretrained("someone/tiny-llama", revision="0123abc")' in readme(run)


def test_card(tmp_path, tiny_folder):
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
        'strategy `bad_system` ("You are an unhelpful assistant."), temperature 0.7, top_p 1, top_k 50',
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


def test_full_parameters(tmp_path, tiny_folder, hub):
    run = make_run(tmp_path, tiny_folder, adapter=False)
    config = run.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tiny_folder)}))
    export.main(run, push="me/tiny-dft")
    assert "_name_or_path" not in json.loads(config.read_text())
    data = ModelCard.load(run.folder / "model" / "README.md").data
    assert data.library_name == "transformers" and "lora" not in data.tags
    assert "PeftModel" not in readme(run) and "full-parameter fine-tune" in readme(run)
    assert AutoModelForCausalLM.from_pretrained(run.folder / "model").config.hidden_size == 32
    assert "model.safetensors" in hub[1][2]


def test_data_of_the_hub_is_named(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.recipe.data.train = "openai/gsm8k:main"
    card = export.card(run)
    assert card.data.datasets == ["openai/gsm8k"]
    assert "4 rows of `openai/gsm8k:main` (split `train`)" in str(card)
    for other in ("toy:bigger-number?n=8", "data/rows.jsonl", str(tmp_path / "rows.jsonl")):
        run.recipe.data.train = other
        assert export.card(run).data.datasets is None


def test_push_creates_privately_and_uploads_the_folder(tmp_path, tiny_folder, hub, capsys):
    run = make_run(tmp_path, tiny_folder)
    run.recipe.export.push = "me/from-recipe"
    export.main(run, push="me/tiny-dft")
    assert hub[0] == ("create", "me/tiny-dft", {"private": True, "exist_ok": True})
    assert hub[1][:2] == ("upload", "me/tiny-dft")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja"} == set(hub[1][2])  # fmt: skip
    export.main(run)
    assert hub[2][1] == "me/from-recipe"
    assert "pushed to" in capsys.readouterr().out


def test_push_refuses_a_local_path_and_names_the_place(tmp_path, tiny_folder, hub, capsys):
    run = make_run(tmp_path, tiny_folder)
    path = run.training.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eva_config": {"cache": ["/home/someone/cache"]}}))
    with pytest.raises(UserError, match="not pushed.*adapter_config.json: eva_config.cache.0 says '/home/someone/c"):
        export.main(run, push="me/tiny-dft")
    assert hub == []
    export.main(run)  # without a push it is only told
    assert "warning" in capsys.readouterr().out
    path.write_text(path.read_text().replace("/home/someone/cache", "elsewhere"))
    run.recipe.negatives.system_prompt = "Read /home/someone/notes.txt first."
    with pytest.raises(UserError, match=r"README.md:\d+ says"):
        run.training.finish()
        export.main(run, push="me/tiny-dft")


@pytest.mark.parametrize("text, local", [
    ("/home/me/base", True), ("/mnt/disk", True), ("see ~/models", True), ("C:\\Users\\me", True), ("file:///x", True),
    ("runs in `/tmp/x`", True), ("hf_" + "Ab1" * 11, True), ("path=/data/llama", True),
    ("https://huggingface.co/someone/tiny", False), ("someone/tiny", False), ("and/or/else", False),
    ("</think>", False), ("model.layers.0", False), ("`P(y'|x)^(1/tau) / P_base(y'|x)`", False), ("1/2/3", False),
    ("base_model:adapter:/work/base", True),
])  # fmt: skip
def test_what_looks_like_a_local_path(text, local):
    assert bool(export.LOCAL.search(text)) == local


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("no token"), ConnectionError("no network"), ValueError("x")])
def test_a_failed_upload_is_told_in_words_and_loses_nothing(tmp_path, tiny_folder, monkeypatch, error):
    run = make_run(tmp_path, tiny_folder)

    class Broken:
        def create_repo(self, *args, **kwargs):
            raise error

    monkeypatch.setattr(export, "HfApi", Broken)
    with pytest.raises(UserError, match="me/tiny-dft: could not be pushed.*hf auth login") as told:
        export.main(run, push="me/tiny-dft")
    assert type(error).__name__ in str(told.value)
    assert (run.training.path / "adapter_model.safetensors").is_file() and "## Loading" in readme(run)


def test_nothing_trained_is_told(tmp_path, tiny_folder):
    run = make_run(tmp_path, tiny_folder)
    run.training.begin()
    with pytest.raises(UserError, match="run `lowdft train RECIPE` first"):
        export.main(run)
