"""The adapter section: every field of peft's configuration, several types, and refusals before a model is loaded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import make_llama, make_rows
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from lowdft import DFTConfig, DFTTrainer
from lowdft.cli import main
from lowdft.config.sections import AdapterSection
from lowdft.data.batch import collate
from lowdft.errors import UserError
from lowdft.logprobs import Group, score
from lowdft.models.adapters import adapter_config, adapter_identity, add_adapter, check_config, load_adapter
from lowdft.models.reference import is_trained
from lowdft.pipeline.context import Run

SOME = [Group([5, 6], [[7, 8], [9]])]
KINDS = ("lora", "ia3", "oft", "loha", "lokr", "vera", "shira")


def arguments(folder, **settings) -> DFTConfig:
    settings = dict(num_train_epochs=1, per_device_train_batch_size=4, save_strategy="no") | settings
    return DFTConfig(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **settings)


def with_adapter(kind: str, dtype: torch.dtype = torch.float32):
    """A tiny model of this dtype under a fresh adapter of a type."""
    options = {"oft": {"oft_block_size": 8}, "vera": {"d_initial": 0.1}}.get(kind, {})
    section = AdapterSection(type=kind, r=2, target_modules=["q_proj", "o_proj"], options=options)
    return add_adapter(make_llama().to(dtype), section, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_under_every_type_are_those_of_the_model_itself(kind):
    """A fresh adapter changes nothing; moved, its log-probabilities are those of peft's own forward pass."""
    before = score(make_llama(), SOME).logps_C
    model = with_adapter(kind).eval()
    torch.testing.assert_close(score(model, SOME).logps_C, before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        logps = model(torch.tensor([[5, 6, 7, 8]])).logits.log_softmax(-1)[0]
    wanted = logps[1, 7] + logps[2, 8]
    found = score(model, SOME).logps_C
    assert found[0].item() == pytest.approx(wanted.item(), abs=1e-4) and (found - before).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_every_type_are_those_of_the_model_itself(kind, tmp_path):
    """A moved adapter's gradient of the completions' likelihood, and plain backpropagation's."""
    model, rows = with_adapter(kind), make_rows(3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    trainer = DFTTrainer(model, arguments(tmp_path, objective="sft"), rows)
    batch = collate(trainer.train_dataset.__getitems__(range(3)))["batch"]
    trainer.engine.begin([batch])
    trainer.engine.accumulate(batch)
    found = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        (-logps[:, start - 1 :].sum() / batch.completion_tokens).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_trains_against_the_base(kind, dtype, tmp_path):
    """A fresh adapter is its own reference; a trained one is known to be none, and is refused as the base."""
    model = with_adapter(kind, dtype)
    trainer = DFTTrainer(model, arguments(tmp_path, max_steps=2, learning_rate=0.05, warmup_steps=0), make_rows(4))
    trainer.train()
    assert trainer.state.log_history[0]["reference/gap"] < 1e-4 and is_trained(model)
    wanted = score(make_llama().to(dtype), [Group(r["prompt_ids"], r["negative_ids"]) for r in make_rows(1)]).logps_C
    assert trainer.train_dataset[0]["ref_negative_logps"] == pytest.approx(wanted.tolist(), abs=1e-3)
    again = DFTTrainer(model, arguments(tmp_path, reference="online"), make_rows(4))
    with pytest.raises(UserError, match="already trained"):
        again.train()


def test_a_sparse_increment_where_gradients_are_largest(tmp_path):
    """SIFT: SHiRA at the places that plain backpropagation finds; only they move, also in a reloaded adapter."""
    section = AdapterSection(type="shira", r=1, target_modules=["q_proj"], options={"mask_type": "gradient"})
    plain, rows = make_llama(), make_rows(4)
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        logps = plain(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        logps[:, start - 1 :].sum().backward()
    model = add_adapter(make_llama(), section, 0, rows)
    DFTTrainer(model, arguments(tmp_path, max_steps=2, learning_rate=0.05, warmup_steps=0), rows).train()
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(make_llama(), tmp_path / "adapter")
    torch.testing.assert_close(score(again, SOME).logps_C, score(model, SOME).logps_C, rtol=0, atol=0)
    for one in (model, again):
        merged = one.merge_and_unload()
        for layer, start in zip(merged.model.layers, plain.model.layers, strict=True):
            weight, before = layer.self_attn.q_proj.weight, start.self_attn.q_proj.weight
            largest = before.grad.abs().flatten().topk(sum(weight.shape)).indices
            moved = (weight != before).flatten().nonzero()[:, 0]
            assert len(moved) and set(moved.tolist()) <= set(largest.tolist())


def test_every_field_of_peft_may_stand_in_the_section():
    config = adapter_config(
        AdapterSection(alpha=8, target_modules=["q_proj"], options={"use_rslora": True, "layers_to_transform": [1]})
    )
    assert (config.r, config.lora_alpha, config.use_rslora, config.layers_to_transform) == (16, 8, True, [1])


@pytest.mark.parametrize(
    "section, in_4bit, words",
    [
        (AdapterSection(type="prompt_tuning"), False, "prompt tuning adds tokens"),
        (AdapterSection(type="lorra"), False, "Did you mean 'lora'"),
        (AdapterSection(options={"use_rslorra": True}), False, "adapter.use_rslorra is not a field.*'use_rslora'"),
        (AdapterSection(target_modules=["lm_head"]), False, "adapter.target_modules has lm_head"),
        (AdapterSection(options={"modules_to_save": ["lm_head"]}), False, "adapter.modules_to_save has lm_head"),
        (AdapterSection(options={"init_lora_weights": "pissa"}), False, "pissa changes the base's weights"),
        (AdapterSection(options={"bias": "all"}), False, "adapter.bias is all, which trains biases of the base itself"),
        (AdapterSection(type="ia3", dropout=0.1), False, "ia3 has no dropout"),
        (AdapterSection(type="shira", options={"mask_type": "fisher"}), False, "'fisher'; wanted random or gradient"),
        (AdapterSection(type="loha"), True, "set model.load_in_4bit: false"),
        (AdapterSection(type="ia3"), True, "set model.load_in_4bit: false"),
    ],
)
def test_what_cannot_work_is_refused(section, in_4bit, words):
    with pytest.raises(UserError, match=words):
        adapter_config(section, in_4bit)


def test_a_configuration_given_in_python_is_checked_too():
    with pytest.raises(UserError, match="PROMPT_TUNING adds tokens"):
        check_config(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    check_config(LoraConfig(target_modules="all-linear"))


def test_spelling_out_a_default_names_the_same_adapter():
    plain, spelled = AdapterSection(), AdapterSection(options={"use_rslora": False, "bias": "none"})
    assert adapter_identity(plain) == adapter_identity(spelled)
    assert adapter_identity(plain) != adapter_identity(AdapterSection(options={"use_dora": True}))
    masks = [AdapterSection(type="shira", options=options) for options in ({}, {"mask_type": "gradient"})]
    assert adapter_identity(masks[0]) != adapter_identity(masks[1])


def test_an_adapter_imports_no_module(tmp_path, monkeypatch):
    """peft imports the module that `megatron_core` names: neither a recipe nor a stranger's adapter may name one."""
    (tmp_path / "planted.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    hostile = {"megatron_config": {"a": 1}, "megatron_core": "planted"}
    with pytest.raises(UserError, match="megatron_config: peft would import the Python module 'planted'"):
        adapter_config(AdapterSection(options=hostile))
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    load_adapter(make_llama(), tmp_path / "adapter")
    config.write_text(json.dumps(json.loads(config.read_text()) | hostile))
    with pytest.raises(UserError, match="adapter_config.json.megatron_config"):
        load_adapter(make_llama(), tmp_path / "adapter")
    config.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_adapter(make_llama(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "setting, words",
    [
        ("use_dora=maybe", "adapter.use_dora is 'maybe'; wanted bool"),  # peft takes any text for true
        ("rank_pattern=5", "adapter.rank_pattern is 5; wanted dict or null"),
        ("exclude_modules=5", "adapter.exclude_modules is 5; wanted (str|list) or (str|list) or null"),
        ("target_modules=5", "adapter.target_modules is 5; wanted (str|list) or (str|list) or null"),
        ("init_lora_weights=gausian", "adapter.init_lora_weights is 'gausian'; wanted bool or gaussian or"),
        ("lora_alpha=eight", "adapter.lora_alpha is 'eight'; wanted int"),
        ("inference_mode=true", "adapter.inference_mode is set by lowdft; remove it"),
        (
            "use_rslorra=true",
            "Did you mean 'use_rslora'? See docs/recipe-reference.md, and peft's documentation",
        ),
        (
            "target_modules=[query]",
            "not found in the base model.* The model's linear layers: down_proj, gate_proj",
        ),
        ("rank_pattern={q_proj: x}", "adapter: peft cannot add it to this model: "),
    ],
)
def test_fields_that_do_not_suit_are_told_before_any_work(setting, words, recipe, capsys, monkeypatch):
    """Before the base writes negatives, too, since peft itself would see it only then."""
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, f"adapter.{setting}"]) == 1
    error = capsys.readouterr().err
    assert re.search(words.replace("?", "."), error) and "Traceback" not in error


def test_modules_that_the_model_does_not_have(tmp_path):
    """Some of several: told, since a list may serve several models; all of them: refused."""
    about = (arguments(tmp_path), make_rows(2))
    with pytest.warns(UserWarning, match="adapter.target_modules has query, but no module has that name"):
        DFTTrainer(make_llama(), *about, peft_config=LoraConfig(target_modules=["query", "q_proj"]))
    with pytest.raises(UserError, match="peft cannot add it to this model: .*The model's linear layers: down_proj"):
        DFTTrainer(make_llama(), *about, peft_config=LoraConfig(target_modules=["query"]))
