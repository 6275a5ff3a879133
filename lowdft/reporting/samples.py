"""Held-out rows for the report: answers marked right or wrong, negatives with their weights, and filters."""

from __future__ import annotations

BYTES = 1_500_000  # maximum amount of text, so that the page stays small
HEADING = 300  # characters of a prompt in a heading

FILTERS = {
    "": "all",
    "right": "right after training",
    "wrong": "wrong after training",
    "changed": "changed",
    "fixed": "wrong before, right after",
    "broken": "right before, wrong after",
}


def of(evaluation: dict) -> dict:
    """`samples`, `filters` (value, name, count) and `samples_note` for the page's template."""
    systems, out, size = list(evaluation["systems"]), [], 0
    for sample in evaluation["samples"]:
        one = _sample(sample, systems)
        size += sum(len(str(value).encode()) for value in one.values())
        if size > BYTES:
            break
        out.append(one)
    counts = {value: sum(value in one["outcome"].split() or not value for one in out) for value in FILTERS}
    checked = counts["right"] + counts["wrong"] > 0
    return {
        "samples": out,
        "filters": [(value, name, counts[value]) for value, name in FILTERS.items()] if checked else [],
        "samples_note": f"{len(out)} of {evaluation['rows']} held-out rows. A negative's weight is how hard it would "
        "be pushed down on a first visit after training.",
    }


def outcome(right: dict[str, bool]) -> str:
    """A row's values for the filters: right or wrong after training, and changed, fixed or broken since the base."""
    if "after" not in right:
        return ""
    found = ["right" if right["after"] else "wrong"]
    if right.get("base", right["after"]) != right["after"]:
        found += ["changed", "fixed" if right["after"] else "broken"]
    return " ".join(found)


def _sample(sample: dict, systems: list[str]) -> dict:
    right, prompt = sample.get("right", {}), sample["prompt"].strip()
    negatives = sample.get("negatives", [])
    return {
        "heading": prompt if len(prompt) <= HEADING else prompt[:HEADING].rsplit(" ", 1)[0] + " …",
        "prompt": prompt,
        "completion": sample["completion"],
        "outcome": outcome(right),
        "answers": [
            {"name": {"base": "base", "after": "tuned"}.get(name, name), "text": sample[name], "right": right.get(name)}
            for name in systems
            if name in sample
        ],
        "negatives": [{"text": one["text"], "told": _told(one)} for one in negatives],
    }


def _told(negative: dict) -> str:
    told = [f"weight {negative['weight']:.2g}"] if "weight" in negative else []
    if {"base", "after"} <= negative.keys():
        told.append(f"log-probability {negative['base']:.1f} nats before, {negative['after']:.1f} after")
    return "; ".join(told)
