"""plan: what a training will take (memory, steps, tokens, and by a short probe time), before anything is loaded."""

from __future__ import annotations

import math
import time

import torch
from rich.console import Console
from rich.table import Table

from lowdft import models
from lowdft.errors import UserError
from lowdft.files.process import peak_bytes
from lowdft.logprobs import Group, choose_layout
from lowdft.models.memory import LIBRARIES, Memory, estimate, sharded
from lowdft.pipeline.context import Run, say
from lowdft.training.token_budget import Passes, num_tokens

GPU_CONTEXT = 0.6e9  # bytes that CUDA itself and its libraries take on a device


def main(run: Run, gpu: float | None = None, gpus: int = 1, probe: bool = False) -> None:
    """Prints the plan.

    Args:
        gpu: memory of a GPU in GB (10^9 bytes), to find the largest `tokens_per_pass` that fits.
        gpus: over how many the training is spread: all parameters by ZeRO-3, adapters as whole copies.
        probe: load the base and time one pass.
    """
    config, args = models.configuration(run.source, run.recipe.model), run.args
    groups = expected_groups(run)
    sizes = sorted((num_tokens(group, "packed") for group in groups), reverse=True)
    largest = min(args.tokens_per_pass, sum(sizes[: args.per_device_train_batch_size]))
    on_gpu = gpu is not None or torch.cuda.is_available()
    memory = estimate(config, run.recipe.model, run.recipe.adapter, args, largest, on_gpu)
    if gpus > 1 and run.recipe.adapter is None:
        memory = sharded(memory, gpus, run.recipe.model.dtype)
    base = GPU_CONTEXT if on_gpu else process_bytes()
    show_memory(memory, base, largest, gpus)
    if gpus == 1 and run.recipe.adapter is None and run.recipe.model.dtype != "float32":
        say(
            f"warning: all parameters in {run.recipe.model.dtype}, without a float32 copy: rounding loses small steps "
            f"(learning rate {args.learning_rate:g}). Set model.dtype=float32, or train with --launch zero3."
        )
    if gpu is not None:
        most = int((gpu * 1e9 - base - memory.fixed) / memory.per_token)
        longest = max(len(g.prompt_ids) + max(map(len, g.completions)) for g in groups)
        if most < longest:
            say(
                f"does not fit {gpu:g} GB: one prompt with one completion has up to {longest} tokens, room is for "
                f"{max(0, most)}. Lower training.max_length, load in 4 bit, set training.gradient_checkpointing=true."
            )
        else:
            say(f"fits {gpu:g} GB up to training.tokens_per_pass={most}")
    if to_write := negatives_to_write(run):
        say(f"before it: {to_write:,} negatives of up to {run.recipe.negatives.max_new_tokens} tokens to write")
    steps, tokens = count_work(run, sizes, gpus)
    over = f", over {gpus} GPUs" if gpus > 1 else ""
    say(f"{steps} steps; {tokens:,} tokens, scored and backpropagated once each{over}")
    if probe:
        rate = tokens_per_second(run, groups, largest)
        hours = tokens / rate / gpus / 3600
        say(
            f"about {hours:.2f} h of training at {rate:.0f} tokens/s{' each' * (gpus > 1)} (a pass, timed here and now)"
        )


def expected_groups(run: Run) -> list[Group]:
    """What one visit of every training row scores; negatives not yet written count with their longest length."""
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
    """How many negatives of the training rows are still to be sampled."""
    if run.ready_negatives() or run.negatives("train").path.is_file():
        return 0
    return len(run.examples("train")) * run.negatives_wanted("train")


def count_work(run: Run, sizes: list[int], gpus: int) -> tuple[int, int]:
    """Optimizer steps and tokens of the whole training on this many rows."""
    args = run.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus
    steps = math.ceil(len(sizes) / per_step) * math.ceil(args.num_train_epochs)
    steps = args.max_steps if args.max_steps > 0 else steps
    return steps, round(sum(sizes) / len(sizes) * min(steps * per_step, len(sizes) * math.ceil(args.num_train_epochs)))


def process_bytes() -> float:
    """What a process takes before any model: this one as it stands."""
    return peak_bytes() + LIBRARIES


def show_memory(memory: Memory, base: float, tokens: int, gpus: int) -> None:
    """The breakdown as a table, in GB (10^9 bytes)."""
    each = f" of each of {gpus} GPUs" if gpus > 1 else ""
    table = Table(title=f"peak memory in training{each}, passes of up to {tokens} tokens", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, value in {"process": base, **memory.parts}.items():
        table.add_row(name, f"{value / 1e9:.2f}")
    table.add_section()
    table.add_row("total (estimate)", f"{(base + memory.total) / 1e9:.2f}")
    if memory.offloaded:
        table.add_row("in CPU memory: offloaded checkpoints", f"{memory.offloaded / 1e9:.2f}")
    Console().print(table)


def tokens_per_second(run: Run, groups: list[Group], tokens: int) -> float:
    """Speed of one forward and backward pass over the first groups, up to `tokens` tokens and 4 of them."""
    model = run.base()
    if run.recipe.adapter:
        model = models.add_adapter(model, run.recipe.adapter, run.args.seed)
    model.train()
    passes = Passes(choose_layout(model, run.args.layout), run.args.logits_chunk_size, tokens)
    some = groups[:4]
    seconds = 0.0
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        passes.backpropagate(model, some, lambda numbers, logps: logps.sum(), lambda loss, last: loss.backward())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return sum(num_tokens(group, passes.layout) for group in some) / seconds
