"""What DFTTrainer does not support is refused with its reason, before a model trains; and what it sets right."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import lora, losses, make_llama, make_rows, make_trainer
from peft import AdaLoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
    TrainingArguments,
)

from lowdft import DFTConfig, DFTTrainer
from lowdft.cli import main
from lowdft.errors import UserError


def arguments(folder, **settings) -> DFTConfig:
    defaults = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", num_train_epochs=2)
    return DFTConfig(output_dir=str(folder), **(defaults | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True},
        {"torch_compile_backend": "inductor"},
        {"torch_compile_mode": "default"},
        {"auto_find_batch_size": True},
        {"include_for_metrics": ["inputs"]},
        {"batch_eval_metrics": True},
        {"parallelism_config": {"tp_size": 2}},
        {"use_liger_kernel": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
        {"include_num_input_tokens_seen": "all"},
        {"resume_from_checkpoint": "nowhere"},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings(settings, tmp_path):
    with pytest.raises(ValueError, match=f"training.{next(iter(settings))} is .*does not support it"):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_prompt_length": -1}, "max_prompt_length is -1; wanted a whole number of 1 or more"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; wanted a whole number of 1 or more"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; wanted a whole number of 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; wanted a whole number of 1 or more"),
        ({"logits_chunk_size": 0}, "logits_chunk_size is 0; wanted a whole number of 1 or more"),
        ({"max_grad_norm": None}, "max_grad_norm is None; wanted a number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; wanted a number"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; wanted a number of 0 or more"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; wanted a number of 0 or more"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; wanted more than 0"),
        ({"log_u_init": float("nan")}, "log_u_init is nan; wanted a number from -10000 to 10000 or first_batch"),
        ({"log_u_init": "inf"}, "log_u_init is inf; wanted a number from -10000 to 10000 or first_batch"),
        ({"log_u_init": 1e300}, "log_u_init is 1e.300; wanted a number from"),
        ({"tau": float("inf")}, "tau is inf; wanted a number above 0"),
        ({"max_length": "8"}, "max_length is '8'; wanted a whole number of 1 or more, or null"),
        ({"negatives_per_step": 1.5}, "negatives_per_step is 1.5; wanted a whole number"),
        ({"max_steps": 0}, "max_steps is 0; wanted a whole number of 1 or more, or -1 for all epochs"),
        ({"eval_steps": -3}, "eval_steps is -3; wanted a number above 0"),
        ({"eval_delay": -1}, "eval_delay is -1; wanted a number of 0 or more"),
        ({"objective": "dpo", "objective_args": {"beta": -1}}, "dpo: beta is -1; wanted a number above 0"),
        ({"objective": "ipo", "objective_args": {"beta": float("inf")}}, "ipo: beta is inf; wanted"),
        ({"objective": "cdpo", "objective_args": {"label_smoothing": 0.5}}, "label_smoothing is 0.5; wanted a number"),
        ({"objective": "kto", "objective_args": {"weight_wanted": -1}}, "kto would not make good answers likelier"),
        ({"objective": "listwise", "objective_args": {"nll_weight": -2}}, "listwise would not make good answers"),
        ({"seed": -1}, "seed is -1; wanted a whole number from 0 to"),
    ],
)
def test_settings_without_a_sense(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_an_output_head(kind, tmp_path):
    with pytest.raises(
        UserError, match=f"the model is a {kind.__name__}; wanted a causal language model with its output head"
    ):
        DFTTrainer(kind(make_llama().config), arguments(tmp_path), make_rows(), peft_config=lora())


@pytest.mark.parametrize(
    "config, words",
    [
        ({"r": 4}, "peft_config is a dict; wanted a configuration of peft"),
        (
            AdaLoraConfig(target_modules=["q_proj"], total_step=10),
            "ADALORA needs its own loss and a call",
        ),
    ],
)
def test_adapters_that_cannot_be_trained_so(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        DFTTrainer(make_llama(), arguments(tmp_path), make_rows(), peft_config=config)


@pytest.mark.parametrize(
    "name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "tokenizer", "ref_model"]
)
def test_arguments(name, tmp_path):
    with pytest.raises(UserError, match=f"does not support {name}"):
        DFTTrainer(make_llama(), arguments(tmp_path), make_rows(), **{name: lambda *_: {}})


def test_an_overridden_loss_would_not_be_called(tmp_path):
    class Own(DFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return 0

    with pytest.raises(
        UserError, match="does not support compute_loss: an overridden compute_loss would not be called"
    ):
        Own(make_llama(), arguments(tmp_path), make_rows())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda model: None, "model is None; wanted a causal language model"),
        (lambda model: "no/where", "model is 'no/where', which cannot be loaded .*Pass a model's folder"),
        (lambda model: model.requires_grad_(False), "no trainable weights.*is_trainable=True"),
        (lambda model: model.merge_adapter() or model, "merged into its weights or switched off"),
        (lambda model: model.base_model.disable_adapter_layers() or model, "no trainable|switched off"),
        (lambda model: model.add_adapter("reference", lora()) or model, 'has an adapter named "reference"'),
    ],
)
def test_models_that_would_not_be_trained(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        DFTTrainer(change(get_peft_model(make_llama(), lora())), arguments(tmp_path), make_rows())


def test_ids_beyond_the_vocabulary_are_refused_in_evaluate_as_well(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match="has the token id 10000, but the model has embeddings for 0 to"):
        trainer.evaluate([row | {"completion_ids": [10000]} for row in make_rows(2)])


def test_cuts_of_rows_given_to_evaluate_are_told(tmp_path):
    trainer, long = make_trainer(tmp_path, max_length=12, max_prompt_length=8), make_rows(2)
    with pytest.warns(UserWarning, match="cut to length: 0 prompts .* 2 completions"):
        trainer.evaluate([row | {"completion_ids": row["completion_ids"] * 9} for row in long])


def test_other_training_arguments(tmp_path):
    with pytest.raises(UserError, match="args is a TrainingArguments; .* lowdft.DFTConfig"):
        DFTTrainer(make_llama(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), make_rows())


def test_evaluation_without_rows(tmp_path):
    with pytest.raises(UserError, match="training.eval_strategy is steps, but there are no rows to evaluate on"):
        make_trainer(tmp_path, eval_strategy="steps")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_soft_prompts(kind, tmp_path):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="soft prompts"):
        DFTTrainer(make_llama(), arguments(tmp_path), make_rows(), peft_config=config)


@pytest.mark.parametrize("fresh", [True, False])
def test_trained_biases_and_a_reference_that_needs_the_base(fresh, tmp_path):
    config, model = lora(), make_llama()
    config.bias = "all"
    model, config = (model, config) if fresh else (get_peft_model(model, config), None)
    with pytest.raises(UserError, match="bias='all'.*drifts"):
        DFTTrainer(model, arguments(tmp_path, reference="online"), make_rows(), peft_config=config)


@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_parameters_of_the_base_trained_beside_an_adapter(reference, tmp_path):
    """peft would not save them, and with the adapter off they would stay changed."""
    model = get_peft_model(make_llama(), lora())
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match="1 parameters of the base itself .*embed_tokens.weight.*modules_to_save"):
        DFTTrainer(model, arguments(tmp_path, reference=reference), make_rows())


def test_trained_biases_leave_no_base_to_score_new_rows_with(tmp_path):
    """They are allowed beside a precomputed reference, but after the training that base is gone."""
    config, model, rows = (
        lora(),
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4)),
        make_rows(),
    )
    config.bias = "all"
    trainer = DFTTrainer(model, arguments(tmp_path, max_steps=1), rows[:4], peft_config=config)
    assert trainer.evaluate(rows[4:])["eval_loss"] > 0  # before a step it is still there
    trainer.train()
    with pytest.raises(UserError, match="no longer there to score them"):
        trainer.evaluate(rows[4:])


def test_router_losses(tmp_path):
    model = make_llama()
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits"):
        DFTTrainer(model, arguments(tmp_path), make_rows(), peft_config=lora())


def test_float16_without_loss_scaling(tmp_path):
    with pytest.raises(UserError, match="float16, whose gradients vanish"):
        DFTTrainer(make_llama().half(), arguments(tmp_path), make_rows(), peft_config=lora())


def test_fp16_on_a_cpu_has_no_loss_scaling(tmp_path, recipe, capsys):
    """There accelerate would train in float16 without a scaler; a recipe is told before negatives are written."""
    with pytest.raises(UserError, match="fp16 is true, and there is no loss scaling on a CPU"):
        DFTTrainer(make_llama(), arguments(tmp_path, fp16=True), make_rows(), peft_config=lora())
    for override in ("training.fp16=true", "model.dtype=float16"):
        assert main(["generate", recipe, override]) == 1
        assert "loss scaling" in capsys.readouterr().err and not (tmp_path / "run" / "negatives.parquet").exists()


def test_several_visible_gpus_without_a_launcher(tmp_path):
    """Batches stay as large as they are said to be."""
    args = arguments(tmp_path, per_device_train_batch_size=2)
    assert args.n_gpu == 0
    args._n_gpu = 2
    assert args.train_batch_size == 4
    with pytest.warns(UserWarning, match="2 GPUs are visible, but only the first is used"):
        DFTTrainer(make_llama(), args, make_rows(), peft_config=lora())
    assert args.train_batch_size == 2


def test_15_dropout_of_the_base_is_off(tmp_path):
    """GPT-2's 0.1, in a model that comes in train mode: packed all the same, and at step 0 policy equals reference."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128)).train()
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    with pytest.warns(UserWarning, match="the base's dropout of 0.1 is switched off"):
        trainer = DFTTrainer(model, args, make_rows(), peft_config=lora(dropout=0.3))
    assert trainer.layout == "packed"
    trainer.train()
    assert len(losses(trainer)) == 1 and trainer.state.log_history[0]["reference/gap"] < 1e-4
    kept = {m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in name}
    assert kept == {0.3}


def record_dtypes(model) -> set[torch.dtype]:
    """What the first layer's query projection gives, as it is found."""
    found = set()
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(lambda module, args, out: found.add(out.dtype))
    return found


@pytest.mark.parametrize("peft", [True, False])
def test_10_bf16_computes_layers_in_bfloat16(peft, tmp_path):
    """A float32 model with bf16=True: weights stay float32, layers compute in bfloat16, and losses are near."""
    plain, half = (make_trainer(tmp_path / str(on), make_rows(4), peft=peft, bf16=on) for on in (False, True))
    dtypes = record_dtypes(half.model)
    plain.train(), half.train()
    assert dtypes == {torch.bfloat16} and {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(plain), rel=0.02) and losses(half) != losses(plain)


def test_10_full_parameters_in_bfloat16_are_trained_in_float32(tmp_path):
    """At 2e-6 bfloat16 weights would stay where they are: here nearly all of them move, and layers stay bfloat16."""
    model = make_llama().bfloat16()
    args = arguments(tmp_path, learning_rate=2e-6, warmup_steps=0, objective="sft", num_train_epochs=4)
    with pytest.warns(UserWarning, match="trained weights were in bfloat16"):
        trainer = DFTTrainer(model, args, make_rows())
    start, dtypes = [p.detach().clone() for p in trainer.model.parameters()], record_dtypes(trainer.model)
    trainer.train()
    moved = sum((a != b).sum().item() for a, b in zip(start, trainer.model.parameters(), strict=True))
    assert dtypes == {torch.bfloat16}
    assert moved > 0.5 * sum(p.numel() for p in start)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_recipe_evaluates_while_it_trains(recipe, tmp_path, capsys):
    """On its held-out rows; without such rows it is refused before anything is loaded."""
    every = ["training.objective=sft", "training.eval_strategy=steps", "training.eval_steps=2"]
    assert main(["run", recipe, *every, "data.eval_rows=0"]) == 1
    assert "training.eval_strategy is steps, but no rows are held out" in capsys.readouterr().err
    assert main(["run", recipe, *every]) == 0
    state = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    found = [line for line in json.loads(state.read_text())["log_history"] if "eval_loss" in line]
    assert found and all(line["eval_logps/positive"] < 0 for line in found)
