"""The difference between two systems, with its standard error."""

from __future__ import annotations

import math
import statistics


def difference(ours: dict[str, float], theirs: dict[str, float], our: dict, their: dict) -> dict:
    """The difference of two scores, `value`, and its standard error, `stderr` (None if unknown).

    If both have values for the same rows, the difference is paired by row, so that the difficulty of rows cancels out.
    Otherwise the standard errors are combined as for independent scores.

    Args:
        ours, theirs: values by row; empty if the score is not their mean.
        our, their: the scores, as {"value", "stderr"}.
    """
    value = our["value"] - their["value"]
    if ours and ours.keys() == theirs.keys():
        rows = [ours[key] - theirs[key] for key in ours]
        error = statistics.stdev(rows) / math.sqrt(len(rows)) if len(rows) > 1 else None
        return {"value": value, "stderr": error, "paired": True}
    errors = [our["stderr"], their["stderr"]]
    return {"value": value, "stderr": None if None in errors else math.hypot(*errors), "paired": False}
