"""Removes from a trained folder what only concerns this machine."""

from __future__ import annotations

from pathlib import Path

from lowdft.files import read_json, write_json

MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path", "_name_or_path")


def clean(folder: Path, name: str, revision: str | None) -> None:
    """Writes the base's public name into every configuration file, and removes what only concerns this machine.

    This happens while the folder is made, so that its manifest lists what will be published. Repeating it changes
    nothing.
    """
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths inside
    for path in folder.glob("*config.json"):
        old = read_json(path)
        new = {key: value for key, value in old.items() if key not in MACHINE_KEYS}
        if path.name == "adapter_config.json":
            new |= {"base_model_name_or_path": name, "revision": revision}
        if new != old:
            write_json(path, new)
