"""Uploads to the Hub: only files on an allow-list, shown first, checked for leaks, and compared afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from lowdft import __version__
from lowdft.errors import UserError
from lowdft.pipeline import leaks

ALLOWED = (
    "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "README.md", ".eval_results/*.yaml",
)  # fmt: skip
TAG = "lowdft"  # on every card; it marks repositories that were made by lowdft


@dataclass(frozen=True)
class Upload:
    """One file of an upload: its name in the repository, and its path or content."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        """The content."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def leaks(self) -> list[str]:
        """What the file would leak, one line each."""
        if isinstance(self.source, Path):
            return list(leaks.in_file(self.source, self.name))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(self.name).name
            path.write_bytes(self.source)
            return list(leaks.in_file(path, self.name))


def select(folder: Path) -> tuple[list[Upload], list[str]]:
    """The files of a folder that may be uploaded, and the names of those that may not (never symbolic links)."""
    chosen, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        linked = any(part.is_symlink() for part in [path, *path.parents] if folder in part.parents)
        if path.is_dir() and not linked:
            continue
        if not linked and any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in ALLOWED):
            chosen.append(Upload(name, path))
        else:
            left.append(name)
    return chosen, left


def listing(files: Sequence[Upload]) -> str:
    """Names and sizes, one line each, and the total size."""
    lines = [f"  {size(file.size):>9}  {file.name}" for file in files]
    return "\n".join([*lines, f"  {size(sum(file.size for file in files)):>9}  in {len(files)} files"])


def size(count: float) -> str:
    """A number of bytes in readable form (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def push(files: Sequence[Upload], name: str, private: bool, kind: str = "model") -> str:
    """Uploads the files in one commit, downloads them again to compare, and returns the repository's address.

    The repository is created if it does not exist; an existing one is written only if it is empty or was made by
    lowdft. After an interruption, the same call sends the remaining files.

    Raises:
        UserError: a file would leak something, the name is taken, or the upload failed.
    """
    found = [line for file in files for line in file.leaks()]
    if found:
        raise UserError(
            f"{name}: not pushed, because something would leak: {'; '.join(found[:10])}. Change it by hand, or train "
            "again with model.hub_id set."
        )
    try:
        api = HfApi()
        address = _repository(api, name, private, kind)
        operations = [
            CommitOperationAdd(file.name, file.source if isinstance(file.source, bytes) else str(file.source))
            for file in files
        ]
        commit = api.create_commit(name, operations, commit_message=f"lowdft {__version__}", repo_type=kind)
        differing = _differing(api, files, name, commit.oid, kind)
    except UserError:
        raise
    except Exception as error:  # every network library has its own kinds
        raise UserError(f"{name}: could not be pushed: {_why(error)}. Nothing is lost; run the same command again: "
                        "files that have arrived are not sent twice.") from error  # fmt: skip
    if differing:
        raise UserError(f"{name}: the files on the Hub differ in {', '.join(differing)}; push again")
    return address


def _repository(api: HfApi, name: str, private: bool, kind: str) -> str:
    try:
        return str(api.create_repo(name, private=private, repo_type=kind))
    except HfHubHTTPError as error:  # 409: it exists; 401 to 403: it may exist, and only creating is not allowed
        if error.response is None or error.response.status_code not in (401, 402, 403, 409):
            raise
        try:
            info = api.repo_info(name, repo_type=kind)
        except HfHubHTTPError:
            raise error from None
    others = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if others and TAG not in (info.tags or []):
        raise UserError(
            f"{name}: this repository already exists, with {len(others)} files that lowdft did not make. Choose "
            "another name, or delete that repository."
        )
    return f"{api.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"


def _differing(api: HfApi, files: Sequence[Upload], name: str, revision: str, kind: str) -> list[str]:
    """The files whose uploaded copy is not identical to the local file."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {
            file: Path(api.hf_hub_download(name, file.name, repo_type=kind, revision=revision, local_dir=folder))
            for file in files
        }
        return [file.name for file, copy in copies.items() if copy.read_bytes() != file.read()]


def _why(error: Exception) -> str:
    told = (str(error).splitlines() or [""])[0][:200]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"the token is missing or not valid ({told}); run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"this token may not write there ({told}); use one with write access, or another name"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"the network is switched off ({told}); unset HF_HUB_OFFLINE"
    if any(kind.__name__ in ("TransportError", "ConnectionError") for kind in type(error).__mro__):
        return f"the Hub cannot be reached ({type(error).__name__}: {told}); check the network"
    return f"{type(error).__name__}: {told}"
