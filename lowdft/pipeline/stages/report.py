"""report: the training run and its results on one page -> report.html and logps.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowdft.files import replacing
from lowdft.pipeline.context import Run, say
from lowdft.reporting import figures, run_page


def main(run: Run, beside: Sequence[str] = ()) -> None:
    """Writes both files and prints the page's warnings; `beside`: other run folders to draw together with this one.

    Raises:
        UserError: nothing was trained yet, or it was trained with other settings than the recipe's.
    """
    run.training.is_done()
    warnings = run_page.write(run, {Path(folder).resolve().name: Path(folder) for folder in beside})
    with replacing(run.folder / "logps.png") as temporary:
        steps = run_page.steps_of(run)
        figures.logps(steps).savefig(temporary, format="png", dpi=160, facecolor="white")
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"{run.folder / 'report.html'}: written, with {run.folder / 'logps.png'}")
