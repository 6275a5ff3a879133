"""What a trained folder holds: nothing that speaks of this machine alone."""

from __future__ import annotations

from pathlib import Path

from lowdft.files import read_json, write_json

MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path", "_name_or_path")


def clean(folder: Path, name: str, revision: str | None) -> None:
    """Calls the base by its public name in every configuration file, and drops what speaks of this machine alone.

    Done while the folder is made, so that its manifest lists what will be published; done again it changes nothing.
    """
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths inside
    for path in folder.glob("*config.json"):
        old = read_json(path)
        new = {key: value for key, value in old.items() if key not in MACHINE_KEYS}
        if path.name == "adapter_config.json":
            new |= {"base_model_name_or_path": name, "revision": revision}
        if new != old:
            write_json(path, new)
