"""The real model in 4 bit: gradients are right after generating and scoring, and policy equals reference at step 0."""

from __future__ import annotations

import random

import bitsandbytes as bnb
import pytest
import torch
from helpers import needs_bfloat16

from lowdft import DFTConfig, DFTTrainer, models
from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.logprobs import Group, score
from lowdft.models.reference import reference_logps, reference_on
from lowdft.sampling import Request, SamplingSettings, get_sampler
from lowdft.training.token_budget import Passes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def section(smollm2) -> ModelSection:
    return ModelSection(name_or_path=smollm2, load_in_4bit=True, dtype="float32")


@pytest.fixture(scope="module")
def source(section):
    return models.locate(section)


def policy(source, section):
    return models.add_adapter(models.load_base(source, section), AdapterSection(), seed=0)


def some_groups(prompts: int = 2) -> list[Group]:
    rng = random.Random(0)

    def ids(n):
        return [rng.randrange(3, 49000) for _ in range(n)]

    return [Group(ids(24), [ids(20), ids(31), ids(17)]) for _ in range(prompts)]


def lora_gradients(model) -> torch.Tensor:
    """All LoRA gradients of a weighted sum of log-probabilities, as one vector; B is off zero so that A counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn_like(parameter))
    model.train()
    logps = score(model, some_groups()).logps_C
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logps @ torch.tensor([1.0, -1.0, 0.5, 1.0, -1.0, 0.5]), parameters)
    return torch.cat([g.flatten() for g in gradients]).double()


def test_gradients_after_generating_and_scoring(source, section):
    """In one process: sample, score, then train. Against the same weights dequantized: cosine at least 0.999."""
    model = policy(source, section)
    sampler = get_sampler("padded", model, [2], SamplingSettings(max_new_tokens=4), batch_size=2)
    assert len(sampler.sample([Request([1, 5, 9], 0), Request([1, 7], 1)])) == 2
    with reference_on(model) as base:
        assert reference_logps(base, some_groups(), Passes("packed", 256, 8192)).isfinite().all()
    found = lora_gradients(model)

    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight = torch.nn.Parameter(weight.to(torch.float32), requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)
    wanted = lora_gradients(model)
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0).item()
    print(f"cosine of all LoRA gradients {cosine:.6f}")
    assert cosine > 0.999
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=0.01)


def test_policy_is_the_reference_at_step_0(source, section, tmp_path):
    """tau 1, training prompt, fresh adapter, float32: |policy - reference| below 1e-3 nats, all weights 1."""
    rng = random.Random(1)
    rows = [
        {"prompt_ids": g.prompt_ids, "completion_ids": g.completions[-1], "negative_ids": g.completions[:2]}
        for g in some_groups(4)
    ]
    rng.shuffle(rows)
    args = DFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DFTTrainer(policy(source, section), args, rows)
    trainer.train()
    entry = trainer.state.log_history[0]
    print(f"reference/gap {entry['reference/gap']:.2e} nats")
    assert entry["reference/gap"] < 1e-3
    assert entry["weights/mean"] == pytest.approx(1.0, abs=1e-3)
    assert trainer.log_u.abs().max() < 1e-3


@needs_bfloat16
def test_bfloat16_keeps_one_numerical_path(smollm2, tmp_path):
    """In bf16 on NF4 too, with the reference scored beforehand and other batches than training's: the gap is no gap.

    Some CPUs (those with AMX) sum a row of a product in an order that depends on how many rows there are. There the
    gap is rounding: no more than that of the base's own scores one by one and all at once.
    """
    section = ModelSection(name_or_path=smollm2, load_in_4bit=True, dtype="bfloat16")
    rng = random.Random(2)

    def ids(most):
        return [rng.randrange(3, 49000) for _ in range(rng.randrange(most // 4, most))]

    rows = [
        {"prompt_ids": ids(200), "completion_ids": ids(200), "negative_ids": [ids(300) for _ in range(4)]}
        for _ in range(6)
    ]
    args = DFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=6, save_strategy="no", disable_tqdm=True
    )
    trainer = DFTTrainer(policy(models.locate(section), section), args, rows)
    groups = [Group(row["prompt_ids"], row["negative_ids"]) for row in rows]
    with reference_on(trainer.model) as base:
        alone, together = (reference_logps(base, groups, Passes("packed", 256, most)) for most in (1, 2**20))
    rounding = (alone - together).abs().mean().item()
    trainer.train()
    gap = trainer.state.log_history[0]["reference/gap"]
    print(f"reference/gap {gap:.2e} nats in bfloat16, rounding {rounding:.2e}")
    assert gap < max(0.05, 2 * rounding)
