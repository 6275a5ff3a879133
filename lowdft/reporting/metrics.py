"""The names of all metrics in tables, charts and figures, and the warning that negatives contribute almost nothing."""

from __future__ import annotations

from collections.abc import Sequence

# metrics on held-out rows: key in evaluation.json -> name in tables, in the order of the table
EVALUATION = {
    "accuracy": "accuracy of greedy answers",
    "wins": "accuracy of choice, summed log-prob",
    "wins_per_token": "accuracy of choice, log-prob per token",
    "margin": "margin, nats",
    "logps/positive": "log-prob of completions, nats",
    "logps/negative": "log-prob of negatives, nats",
    "logps/positive_per_token": "log-prob of completions per token, nats",
}
SHARES = ("accuracy", "wins", "wins_per_token")  # between 0 and 1, shown as percentages

# the columns of a study's table
STUDY = {
    "accuracy": "accuracy, %",
    "wins": "accuracy of choice, summed, %",
    "wins_per_token": "accuracy of choice, per token, %",
    "margin": "margin, nats",
    "logps/positive": "completions, nats",
    "logps/negative": "negatives, nats",
    "seconds": "training, negatives, reference, s",
    "peak_memory_gb": "peak GB",
}

# metrics of training with a chart each: key in metrics.jsonl -> (title, unit)
TRAINING = {
    "loss": ("Objective", "nats"),
    "margin": ("Margin of completions over negatives", "nats"),
    "weights/mean": ("Mean weight of a negative", "weight, log scale"),
    "weights/ess": ("Effective number of negatives", "negatives per prompt"),
    "log_u/mean": ("Moving average log_u", "nats, mean over examples"),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Speed", "tokens per second"),
    "peak_memory_gb": ("Peak memory", "GB"),
}
LOGPS = {"logps/positive": "completions", "logps/negative": "negatives"}
HINTS = {  # shown under the charts
    "logps": "Completions should rise and negatives fall. If both fall, training also makes good answers less likely.",
    "margin": "How much likelier a completion is than its negatives.",
    "weights/mean": "How hard a negative is pushed down. Near 0 the negatives contribute nothing.",
    "weights/ess": "How many of a prompt's negatives have a relevant weight.",
    "log_u/mean": "What the weights are divided by: an average of the negatives' likelihood relative to the base.",
    "log_u": "One value per example, from the newest checkpoint.",
}
GLOSSARY = {
    "nat": "The unit of natural logarithms: one nat less means 2.7 times less likely.",
    "margin": "Log-probability of the completion minus the mean log-probability of its negatives.",
    "weight (omega)": "How hard training pushes a negative down; 0 means not at all.",
    "effective number": "(sum of weights)² / sum of squares: how many negatives share the push.",
    "log_u": "The logarithm of a moving average per example, by which the weights are divided.",
}
LOGARITHMIC = ("weights/mean",)

# ---- when the negatives contribute nothing ------------------------------------------------------------------------

NEGLIGIBLE = 0.01  # below this mean weight the negatives contribute almost nothing to the gradient
NEGLIGIBLE_LINES = 5  # consecutive log lines below it after which a running training warns
REMEDIES = (
    "Try a lower training.learning_rate, harder negatives (closer to the completions), fewer epochs, or, with DFT, a "
    "larger training.tau."
)


def negligible(weights: Sequence[float]) -> str | None:
    """A warning if the mean weight over the last quarter of the steps is below `NEGLIGIBLE`."""
    last = weights[-max(1, len(weights) // 4) :]
    mean = sum(last) / len(last) if last else 1.0
    if mean >= NEGLIGIBLE:
        return None
    return (
        f"The negatives contribute almost nothing: their mean weight over the last quarter of the steps is {mean:.1e} "
        f"(below {NEGLIGIBLE}). Training then costs more than SFT for the same result. {REMEDIES}"
    )


def became_negligible(weights: Sequence[float]) -> str | None:
    """A warning at the first log line at which the weight has been below `NEGLIGIBLE` for `NEGLIGIBLE_LINES` lines.

    `weights` are those of all log lines so far.
    """
    last, before = weights[-NEGLIGIBLE_LINES:], weights[:-NEGLIGIBLE_LINES][-1:]
    if len(last) < NEGLIGIBLE_LINES or max(last) >= NEGLIGIBLE or any(value < NEGLIGIBLE for value in before):
        return None
    return (
        f"The negatives contribute almost nothing: their mean weight has been below {NEGLIGIBLE} for "
        f"{NEGLIGIBLE_LINES} log lines (now {last[-1]:.1e}). Training now costs more than SFT for the same result. "
        f"{REMEDIES}"
    )
