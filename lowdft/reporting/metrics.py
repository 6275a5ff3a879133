"""The names of every metric, for tables, charts and figures; and when negatives count as contributing nothing."""

from __future__ import annotations

from collections.abc import Sequence

# of held-out rows: key of evaluation.json -> what a table calls it, in the table's order
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

# of training: charts of one line, key of metrics.jsonl -> (title, unit)
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
HINTS = {  # under a chart: what to look for
    "logps": "Wanted: completions rise, negatives fall. Both falling means that training takes more than it gives.",
    "margin": "How much likelier a completion is than its negatives.",
    "weights/mean": "How hard a negative is pushed down. Near 0 the negatives contribute nothing.",
    "weights/ess": "Of the negatives of one prompt, how many carry weight.",
    "log_u/mean": "What the weights are measured against: an average of the negatives' likelihood against the base.",
    "log_u": "One value per example, from the newest checkpoint.",
}
GLOSSARY = {
    "nat": "The unit of a natural logarithm: one nat less likely is 2.7 times less likely.",
    "margin": "Log-probability of the completion minus the mean of its negatives'.",
    "weight (omega)": "How strongly training pushes one negative down, 0 for not at all.",
    "effective number": "(sum of weights)² / sum of squares: how many negatives share the push.",
    "log_u": "A moving average per example that the weights are divided by, as a logarithm.",
}
LOGARITHMIC = ("weights/mean",)

# ---- when the negatives contribute nothing ------------------------------------------------------------------------

NEGLIGIBLE = 0.01  # mean weight under which the negatives contribute almost nothing to the gradient
NEGLIGIBLE_LINES = 5  # log lines in a row under it, before a running training says so
REMEDIES = (
    "Try a lower training.learning_rate, a larger training.tau, harder negatives (closer to the completions), or "
    "fewer epochs."
)


def negligible(weights: Sequence[float]) -> str | None:
    """A warning when the mean weight over the last quarter of the steps is under `NEGLIGIBLE`."""
    last = weights[-max(1, len(weights) // 4) :]
    mean = sum(last) / len(last) if last else 1.0
    if mean >= NEGLIGIBLE:
        return None
    return (
        f"The negatives contribute almost nothing: their mean weight over the last quarter of the steps is {mean:.1e} "
        f"(under {NEGLIGIBLE}). DFT then costs more than SFT for the same result. {REMEDIES}"
    )


def became_negligible(weights: Sequence[float]) -> str | None:
    """A warning at exactly that log line at which the weight has been under `NEGLIGIBLE` for `NEGLIGIBLE_LINES` lines.

    `weights` are those of all log lines so far.
    """
    last, before = weights[-NEGLIGIBLE_LINES:], weights[:-NEGLIGIBLE_LINES][-1:]
    if len(last) < NEGLIGIBLE_LINES or max(last) >= NEGLIGIBLE or any(value < NEGLIGIBLE for value in before):
        return None
    return (
        f"The negatives contribute almost nothing: their mean weight has been under {NEGLIGIBLE} for "
        f"{NEGLIGIBLE_LINES} log lines (now {last[-1]:.1e}). DFT now costs more than SFT for the same result. "
        f"{REMEDIES}"
    )
