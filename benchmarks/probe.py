"""Compares the predictions of `lowdft probe` with the results of studies, cell by cell.

    python benchmarks/probe.py recipes/studies/arc-easy.yaml recipes/studies/openbookqa.yaml …

A cell is a line of a study's table with a difference from SFT (its `ahead`, by accuracy if that was checked, else by
accuracy of choice). It counts if the difference exceeds one standard error. The probe is right if the gain that it
predicts for the line's objective has the same sign. The probe runs once per study, on its recipe with the settings of
the grid's first combination, and is kept in the study's folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lowdft.config.recipe import load_recipe
from lowdft.files import read_json
from lowdft.pipeline.context import Run
from lowdft.pipeline.stages import probe
from lowdft.study import as_overrides, combinations, label, read_study


def cells(path: Path) -> list[dict]:
    """What the probe predicted and what was measured, one dict per line of the study's table."""
    study = read_study(path)
    folder = Path(study["output_dir"])
    if not (folder / "study.json").is_file():
        print(f"{path}: no results yet, left out", file=sys.stderr)
        return []
    runs = combinations(study)
    if not (folder / "probe.json").is_file():
        settings = runs[0][1] | {"output_dir": str(folder), "training.objective": "listwise"}
        probe.main(Run(load_recipe(study["recipe"], as_overrides(settings))))
    foreseen, found = read_json(folder / "probe.json"), []
    objectives = {label(chosen, study["spread"]): settings.get("training.objective") for chosen, settings in runs}
    for line in read_json(folder / "study.json")["table"]:
        key = next((key for key in ("accuracy", "wins") if key in line["ahead"]), None)
        gain = foreseen["gains"].get(objectives.get(line["name"]))
        if key is None or gain is None or objectives[line["name"]] == "sft":
            continue
        difference, error = line["ahead"][key][:2]
        scale = 100 / max(abs(foreseen["gains"]["sft"]["gain"]), 1e-30)
        found.append(
            {
                "cell": f"{path.stem}, {line['name']}",
                "foreseen": f"{scale * gain['ahead']:+.0f} ± {scale * gain['error']:.0f}%",
                "recommended": foreseen["objective"],
                "measured": f"{100 * difference:+.1f} ± {100 * error:.1f}",
                "counts": abs(difference) > error,
                "right": (gain["ahead"] > 0) == (difference > 0),
            }
        )
    return found


def main(paths: list[str]) -> None:
    """Prints the table and the hit rate."""
    found = [cell for path in paths for cell in cells(Path(path))]
    print("| study, line | predicted gain, relative to SFT's | recommended | measured difference, points | right |")
    print("|---|---|---|---|---|")
    for cell in found:
        right = ("yes" if cell["right"] else "no") if cell["counts"] else "within one error"
        print(f"| {cell['cell']} | {cell['foreseen']} | {cell['recommended']} | {cell['measured']} | {right} |")
    counted = [cell["right"] for cell in found if cell["counts"]]
    rate = f", {100 * sum(counted) / len(counted):.0f}%" if counted else ""
    print(f"\nThe sign is right in {sum(counted)} of {len(counted)} cells that exceed one standard error{rate}.")


if __name__ == "__main__":
    main(sys.argv[1:])
