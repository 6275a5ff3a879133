"""The share of a machine's rate of matrix products that a training step reaches."""

from __future__ import annotations

import time

import torch


def linear_shapes(model) -> dict[tuple[int, int], int]:
    """The number of linear layers of each (inputs, outputs) in the base, without its head."""
    found: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            shape = module.in_features, module.out_features
            found[shape] = found.get(shape, 0) + 1
    return found


def useful_flop(name: str, layers: dict, head: int, rows: list[dict]) -> float:
    """The products that the method needs: forward and backward for every token of a group, and the reference's pass."""
    weights = sum(inputs * outputs * count for (inputs, outputs), count in layers.items())
    prompt, positive = (sum(len(row[key]) for row in rows) for key in ("prompt_ids", "completion_ids"))
    negative = sum(len(ids) for row in rows for ids in row["negative_ids"])
    flop = 4.0 * (weights * (prompt + positive + negative) + head * (positive + negative))
    if name in ("dft", "padded dft", "dft B=1"):
        flop += 2.0 * (weights * (prompt + negative) + head * negative)
    if name == "trl dpo":
        flop += 2.0 * (weights * (prompt + positive + negative) + head * (positive + negative))
    return flop


def product_rate(layers: dict, tokens: int, dtype: torch.dtype, device) -> float:
    """Flop/s of the layers' products with that many tokens; the fastest of three rounds."""
    times = []
    inputs = {shape: torch.randn(tokens, shape[0], dtype=dtype, device=device) for shape in layers}
    weights = {shape: torch.randn(shape, dtype=dtype, device=device) for shape in layers}
    for _ in range(3):
        seconds = 0.0
        for shape, count in layers.items():
            start = time.perf_counter()
            inputs[shape] @ weights[shape]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += count * (time.perf_counter() - start)
        times.append(seconds)
    return 2.0 * tokens * sum(a * b * count for (a, b), count in layers.items()) / min(times)
