"""plan: estimates the memory, steps and tokens of training without loading weights, and the time with a short probe."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.graph import save_on_cpu

from lowdft import models
from lowdft.compat import checkpoint_layers
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError, is_out_of_memory
from lowdft.files.process import peak_bytes
from lowdft.logprobs import Group, bare, choose_layout
from lowdft.models.memory import LIBRARIES, Memory, estimate, generation_memory, scoring_memory
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.fitting import Fit, fits, largest_pass, with_settings
from lowdft.pipeline.negatives import negatives_sampler
from lowdft.sampling import Request
from lowdft.sampling.draw import SAMPLES_ON_A_CPU, sample_bytes
from lowdft.training.token_budget import Passes, num_tokens

GPU_CONTEXT = 0.6e9  # bytes that CUDA itself and its libraries take on a device


def main(run: Run, gpu: float | None = None, gpus: int = 1, probe: bool = False) -> None:
    """Prints the plan.

    Args:
        gpu: memory of a GPU in GB (10^9 bytes), to find the fastest setting that fits.
        gpus: how many GPUs share the training: all parameters with ZeRO-3, adapters as full copies.
        probe: load the base and time one pass, and one batch of negatives if they are still to be generated; with
            `gpu`, under the fastest setting that fits it.
    """
    config, args = models.configuration(run.source, run.recipe.model), run.args
    groups = expected_groups(run)
    on_gpu = gpu is not None or torch.cuda.is_available()
    base = GPU_CONTEXT if on_gpu else process_bytes()
    largest = largest_pass(args, groups, args.tokens_per_pass)
    memory = estimate(config, run.recipe.model, run.recipe.adapter, args, largest, on_gpu, gpus)
    budget = sum(num_tokens(group, "packed") for group in largest)
    show_memory(memory, base, budget, gpus)
    if gpu is not None:
        best = show_fits(run, config, groups, gpu, base, gpus)
        args, budget, probe = (
            (with_settings(args, best.settings), best.tokens, probe) if best else (args, budget, False)
        )
    scoring = scoring_memory(config, run.recipe.model, run.recipe.adapter, args, largest, on_gpu)
    say(f"evaluation and reference: {(base + scoring) / 1e9:.2f} GB")
    to_write = negatives_to_write(run)
    if to_write:
        samples, needed = generation(run, config, None if gpu is None else gpu * 1e9 - base)
        say(
            f"before training: generate {to_write:,} negatives of up to {run.recipe.negatives.max_new_tokens} tokens, "
            f"{samples} at once in {(base + needed) / 1e9:.2f} GB"
        )
    steps, tokens = count_work(run, [num_tokens(group, "packed") for group in groups], gpus)
    over = f", over {gpus} GPUs" if gpus > 1 else ""
    say(f"{steps} steps; {tokens:,} tokens, scored and backpropagated once each{over}")
    if probe:
        show_times(run, args, groups, budget, tokens, to_write, gpus)


def show_fits(run: Run, config, groups: list[Group], gpu: float, base: float, gpus: int) -> Fit | None:
    """The settings that fit a GPU, fastest first, or what to change; returns the fastest."""
    found = fits(run.recipe, run.args, config, groups, gpu * 1e9 - base, gpus)
    if not found:
        longest = max(len(g.prompt_ids) + max(map(len, g.completions)) for g in groups)
        say(
            f"does not fit into {gpu:g} GB: one prompt with one completion has up to {longest} tokens. Lower "
            "training.max_length, load the base in 4 bit, use a smaller adapter or training.optim=paged_adamw_8bit."
        )
        return None
    table = Table(title=f"settings that fit into {gpu:g} GB, fastest first (computed)", title_justify="left")
    for name in ("training.", "tokens_per_pass", "GB", "time"):
        table.add_column(name, justify="left" if name == "training." else "right", overflow="fold")
    for fit in found:
        words = " ".join(setting_words(fit.settings))
        table.add_row(words, str(fit.tokens), f"{(base + fit.bytes) / 1e9:.1f}", f"{fit.work / found[0].work:.2f}")
    Console().print(table)
    best = [*setting_words(found[0].settings), f"tokens_per_pass={found[0].tokens}"]
    say(f"fits into {gpu:g} GB, fastest with " + " ".join(f"training.{word}" for word in best))
    return found[0]


def setting_words(settings: dict) -> list[str]:
    """Fields of `DFTConfig` as overrides."""
    words = []
    for name, value in settings.items():
        if name == "gradient_checkpointing_kwargs":
            words += [f"{name}.{key}={v}" for key, v in value.items()]
        else:
            words.append(f"{name}={str(value).lower()}")
    return words


def generation(run: Run, config, room: float | None) -> tuple[int, float]:
    """How many negatives are generated at once, and the peak memory in bytes, including the weights.

    Args:
        room: free bytes of the GPU before the model is loaded; None on a CPU.
    """
    section = run.recipe.negatives
    prompt = max(len(run.sampling_ids(example)) for example in run.examples("train"))
    per_prompt = run.negatives_wanted("train")

    def needed(samples: int) -> float:
        prompts = math.ceil(samples / per_prompt)
        return generation_memory(config, run.recipe.model, prompts, samples, prompt, section.max_new_tokens)

    samples = section.batch_size or SAMPLES_ON_A_CPU
    if section.batch_size is None and room is not None:
        size = getattr(torch, run.recipe.model.dtype).itemsize
        each = sample_bytes(config, size, prompt + section.max_new_tokens)
        samples = max(1, int((room - needed(1)) / 2 / each))
    samples = min(samples, len(run.examples("train")) * per_prompt)
    return samples, needed(samples)


def show_times(
    run: Run, args: DFTConfig, groups: list[Group], budget: int, tokens: int, to_write: int, gpus: int
) -> None:
    """Prints the hours of training and of generating negatives, from one pass of up to `budget` tokens and one batch,
    both timed on this machine."""
    model = run.base()
    each = " each" * (gpus > 1)
    if to_write:
        per_hour, answers = negatives_per_hour(run, model)
        say(
            f"about {to_write / per_hour / gpus:.2f} h to generate negatives at {per_hour:.0f} per hour{each} "
            f"({answers} of them, timed on this machine)"
        )
    if run.recipe.adapter:
        model = models.add_adapter(model, run.recipe.adapter, run.args.seed)
    rate = tokens_per_second(args, model, groups, budget)
    hours = tokens / rate / gpus / 3600
    say(f"about {hours:.2f} h of training at {rate:.0f} tokens/s{each} (a pass, timed on this machine)")


def negatives_per_hour(run: Run, model) -> tuple[float, int]:
    """The speed of one batch of negatives for the first prompts, and how many they were."""
    section, per_prompt = run.recipe.negatives, run.negatives_wanted("train")
    backend = "padded" if section.backend == "vllm" else section.backend
    sampler = negatives_sampler(run, model, backend)
    some = run.examples("train")[: math.ceil((section.batch_size or SAMPLES_ON_A_CPU) / per_prompt)]
    requests = [Request(run.sampling_ids(example), k) for example in some for k in range(per_prompt)]
    start = time.perf_counter()
    sampler.sample(requests)
    return 3600 * len(requests) / (time.perf_counter() - start), len(requests)


def expected_groups(run: Run) -> list[Group]:
    """What one visit of every training row scores; negatives yet to be generated count with their maximum length."""
    count = run.args.negatives_per_step if run.objective.uses_negatives else 0
    written = run.ready_negatives() or run.negatives("train").path.is_file()
    longest = [[0] * run.recipe.negatives.max_new_tokens] * count
    groups = []
    for row in run.encoded("train", with_negatives=bool(count) and written):
        negatives = row["negative_ids"][:count] if written and count else longest
        groups.append(Group(row["prompt_ids"], [*negatives, row["completion_ids"]]))
    if not groups:
        raise UserError("there are no training rows to plan for")
    return groups


def negatives_to_write(run: Run) -> int:
    """How many of the training rows' negatives are yet to be sampled."""
    if run.ready_negatives() or run.negatives("train").path.is_file():
        return 0
    return len(run.examples("train")) * run.negatives_wanted("train")


def count_work(run: Run, sizes: list[int], gpus: int) -> tuple[int, int]:
    """Optimizer steps and tokens of training on this many rows."""
    args = run.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus
    steps = math.ceil(len(sizes) / per_step) * math.ceil(args.num_train_epochs)
    steps = args.max_steps if args.max_steps > 0 else steps
    return steps, round(sum(sizes) / len(sizes) * min(steps * per_step, len(sizes) * math.ceil(args.num_train_epochs)))


def process_bytes() -> float:
    """The memory of a process before it loads a model: that of this process."""
    return peak_bytes() + LIBRARIES


def show_memory(memory: Memory, base: float, tokens: int, gpus: int) -> None:
    """Prints the breakdown as a table, in GB (10^9 bytes)."""
    each = f" on each of {gpus} GPUs" if gpus > 1 else ""
    table = Table(title=f"peak memory of training{each}, passes of up to {tokens} tokens", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, value in {"process": base, **memory.parts}.items():
        table.add_row(name, f"{value / 1e9:.2f}")
    table.add_section()
    table.add_row("total (estimate)", f"{(base + memory.total) / 1e9:.2f}")
    if memory.offloaded:
        table.add_row("offloaded checkpoints in CPU memory", f"{memory.offloaded / 1e9:.2f}")
    Console().print(table)


def tokens_per_second(args: DFTConfig, model, groups: list[Group], tokens: int) -> float:
    """The speed of a forward and backward pass over the first 4 groups, with the training's checkpointing and budget.

    Raises:
        UserError: a pass of one prompt with one completion does not fit into memory.
    """
    model.train()
    if args.gradient_checkpointing:
        checkpoint_layers(bare(model), args.gradient_checkpointing_kwargs or {})
    passes = Passes(choose_layout(model, args.layout), args.logits_chunk_size, tokens)
    offloaded = save_on_cpu(pin_memory=torch.cuda.is_available()) if args.offload_checkpoints else nullcontext()
    some, seconds, timed = groups[:4], 0.0, 0
    while timed < 2:  # the first pass warms up
        start = time.perf_counter()
        try:
            with offloaded:
                passes.backpropagate(
                    model, some, lambda numbers, logps: logps.sum(), lambda loss, last: loss.backward()
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold on to the tensors of the failed pass
        else:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, timed = time.perf_counter() - start, timed + 1
            continue
        model.zero_grad(set_to_none=True)
        passes.shrink(some, failure)
    return sum(num_tokens(group, passes.layout) for group in some) / seconds
