"""Warnings about the numbers of a run, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from lowdft.reporting.metrics import negligible

SHARE = 0.05  # warn above this share of negatives that are empty or equal to the completion
CAPPED = 0.10  # warn above this share of negatives that reached the length limit
AT_START = 0.9  # a moving average counts as stuck if its initial value makes up this share
REPEATED = 4  # an answer repeats itself if the same four words occur this often


def of_steps(steps: Sequence[dict]) -> Iterator[str]:
    """Warnings from the log lines of training."""
    if warning := negligible([step["weights/mean"] for step in steps if "weights/mean" in step]):
        yield warning
    values = [step["logps/positive"] for step in steps if "logps/positive" in step]
    if len(values) >= 8:
        part = len(values) // 4
        first, last = values[:part], values[-part:]
        before, after = sum(first) / part, sum(last) / part
        noise = math.sqrt((_variance(first) + _variance(last)) / part)
        if before - after > 2 * noise + 0.01 * abs(before):
            yield (
                f"The completions themselves became less likely: their mean log-probability fell from {before:.1f} to "
                f"{after:.1f} nats. Lower training.learning_rate, or give the completions more weight "
                "(training.objective_args.nll_weight)."
            )


def of_log_u(values: Sequence[float], visits: Sequence[int], start: float | str, gamma: float | None) -> Iterator[str]:
    """A warning if moving averages still mostly consist of their initial values.

    After k visits the initial value contributes (1 - gamma)^k u_0. If that is at least `AT_START` of an example's
    average, its negatives had almost no influence on it.
    """
    if isinstance(start, str) or not gamma or gamma >= 1:
        return
    pairs = [(value, count) for value, count in zip(values, visits, strict=True) if count > 0]
    stuck = sum(start + k * math.log1p(-gamma) - value >= math.log(AT_START) for value, k in pairs)
    if pairs and stuck > len(pairs) / 2:
        yield (
            f"The moving average log_u of {stuck} of {len(pairs)} examples still mostly consists of its initial value "
            f"(training.log_u_init {start:g}): the negatives are far less likely than it assumes, so their weights "
            "stay small. Set training.log_u_init: first_batch, or train more epochs."
        )


def of_negatives(facts: dict[str, object]) -> Iterator[str]:
    """Warnings about the negatives that were sampled from the base, from their counts."""
    total = facts.get("negatives")
    if not isinstance(total, int) or not total:
        return
    for key, limit, words in [
        ("cut_at_max_new_tokens", CAPPED, "end at the length limit instead of an end token. Raise "
         "negatives.max_new_tokens, or end them with negatives.stop."),
        ("equal_to_the_completion", SHARE, "equal the completion, which DFT then pushes down. Use another "
         "negatives.strategy, a higher temperature, or negatives.resample."),
        ("empty", SHARE, "are empty. Use another negatives.strategy, or negatives.resample."),
    ]:  # fmt: skip
        count = facts.get(key, 0)
        if isinstance(count, int) and count > limit * total:
            yield f"{count} of {total} negatives ({count / total:.0%}) {words}"


def of_samples(samples: Sequence[dict]) -> Iterator[str]:
    """A warning if the trained model repeats itself more often than the base."""
    count = {name: sum(repeats(s[name]) for s in samples if name in s) for name in ("base", "after")}
    answered = sum("after" in s for s in samples)
    if count["after"] > count["base"] and count["after"] > SHARE * answered:
        yield (
            f"{count['after']} of {answered} answers of the trained model repeat the same words over and over (the "
            f"base: {count['base']}). Lower training.learning_rate or the number of epochs."
        )


def repeats(text: str) -> bool:
    """Whether the same sequence of four words occurs at least `REPEATED` times."""
    words = text.split()
    grams = Counter(zip(*(words[i:] for i in range(4)), strict=False))
    return max(grams.values(), default=0) >= REPEATED


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
