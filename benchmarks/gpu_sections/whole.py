"""Sections on whole things: the trainer, running out of memory, generation, and giving memory back."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig

from gpu_sections.common import Setting, require_cuda
from lowdft import DFTConfig, DFTTrainer
from lowdft.sampling import Request, SamplingSettings, get_sampler


def trainer(setting: Setting) -> dict:
    """DFT and DFT2, four steps each: first gap, losses, and the difference of a resumed training."""
    found, passed = {}, True
    for objective in ("dft", "dft2"):
        folder = tempfile.mkdtemp()
        whole = _train(setting, objective, folder)
        logs = [entry for entry in whole.state.log_history if "loss" in entry]
        found[objective] = {"losses": [round(entry["loss"], 4) for entry in logs]}
        if "reference/gap" in logs[0]:
            found[objective]["gap"] = logs[0]["reference/gap"]
        resumed = _train(setting, objective, folder, resume=str(Path(folder) / "checkpoint-2"))
        pairs = zip(_trained(whole), _trained(resumed), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        found[objective]["resumed differs by"] = difference
        passed &= difference < 1e-4
    return {"passed": passed} | found


def _train(setting: Setting, objective: str, folder: str, resume: str | None = None) -> DFTTrainer:
    rows = [
        {"prompt_ids": g.prompt_ids, "completion_ids": g.completions[-1], "negative_ids": g.completions[:-1]}
        for seed in range(4)
        for g in setting.groups(setting.tokens[0], seed)[:1]
    ]
    on_gpu = setting.device.type == "cuda"
    args = DFTConfig(
        output_dir=folder, objective=objective, max_steps=4, per_device_train_batch_size=2, save_steps=2,
        report_to="none", disable_tqdm=True, gradient_checkpointing=True, use_cpu=not on_gpu,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    made = DFTTrainer(setting.base(None if setting.tiny else 4), args, rows, peft_config=lora)
    made.train(resume_from_checkpoint=resume)
    return made


def _trained(made: DFTTrainer) -> list[torch.Tensor]:
    return [p.detach().float().cpu() for p in made.model.parameters() if p.requires_grad]


def out_of_memory(setting: Setting) -> dict:
    """Out of memory under a memory limit: passes shrink, and the gradient stays."""
    require_cuda(setting, "a memory limit")
    model, groups = setting.policy(), setting.groups(setting.tokens[-1])
    plain = setting.gradient(model, setting.passes(setting.tokens[0]), groups)
    setting.forget()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_allocated() + 3e9
    passes = setting.passes()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            passes.score(model, groups)
            while True:
                try:
                    found = setting.gradient(model, passes, groups)
                    break
                except torch.OutOfMemoryError as error:
                    failure = error.with_traceback(None)
                passes.shrink(groups, failure)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    cosine = torch.nn.functional.cosine_similarity(found, plain, dim=0).item()
    return {"passed": cosine > 0.99 and passes.budget < 10**6, "budget": passes.budget, "warnings": len(caught),
            "cosine": cosine}  # fmt: skip


def generation(setting: Setting) -> dict:
    """Tokens/s of generation, padded and continuous, by samples at once."""
    model, found = setting.base(), {}
    prompt, new = (8, 8) if setting.tiny else (256, 64)
    for batch in (4,) if setting.tiny else (32, 128, 256):
        requests = [Request([5 + i % 50] * prompt, i) for i in range(batch)]
        for backend in ("padded", "continuous"):
            sampler = get_sampler(backend, model, [2], SamplingSettings(max_new_tokens=new), batch)
            start = time.perf_counter()
            try:
                samples = sampler.sample(requests)
            except Exception as error:
                found[f"{backend} {batch}"] = f"{type(error).__name__}: {error}"[:100]
                continue
            written = sum(len(sample.token_ids) for sample in samples)
            found[f"{backend} {batch}"] = round(written / (time.perf_counter() - start), 1)
    return found


def deletion(setting: Setting) -> dict:
    """Bytes that a deleted 4-bit model leaves allocated, before and after a collection."""
    require_cuda(setting, "memory after a deletion")
    setting._model = None
    setting.forget()
    before = torch.cuda.memory_allocated()
    model = setting.base(4)
    held = torch.cuda.memory_allocated() - before
    del model
    left = torch.cuda.memory_allocated() - before
    gc.collect()
    after = torch.cuda.memory_allocated() - before
    return {"passed": after < 0.01 * held, "held": held, "left": left, "after a collection": after}
