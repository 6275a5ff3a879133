"""Finds what must not be uploaded: access tokens, private keys, values of secret variables, local paths, addresses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
from safetensors import safe_open

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_?secret_?access_?key\W{1,4}[A-Za-z0-9/+]{40}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a Weights & Biases key": r"(?i)\bwandb\w*\W{1,20}[0-9a-f]{40}\b|\bwandb_v1_\w{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a signed web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password": r"\b[a-z][a-z+]*://[^\s/:@]+:[^\s/@]+@|(?i:\b(?:password|passwd|api_?key|secret_?key)\b\W{1,4}[^\s\"']{8,})",
}
# an absolute path of two parts or more, a home or Windows path, a file URL
LOCAL = r"(?<![\w./<)\]}])/[\w.@+-]+/[\w.@+-]|(?<![\w/])~/\w|\b[A-Za-z]:\\[\w .-]+\\\w|\bfile://"
PRIVATE = {"a local path": LOCAL, "an e-mail address": r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"}
SECRET_NAME = re.compile(r"(?i)token|key|secret|passw|credential")
SHORTEST = 8  # characters; shorter values of variables would be found by chance
VOCABULARY = {
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
    "merges.txt",
}  # tokens may look like paths
TEXT = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".toml", ".cfg", ".py"}


def find(text: str, private: bool = True) -> Iterator[tuple[str, str]]:
    """(what it is, shortened text) for everything in a text that must not be uploaded.

    `private` also finds local paths and e-mail addresses.
    """
    for what, pattern in (SECRETS | PRIVATE if private else SECRETS).items():
        for match in re.finditer(pattern, text):
            yield what, text.strip()[:120] if what in PRIVATE else _shortened(match.group())
    for name, value in secret_variables().items():
        if value in text:
            yield f"the value of the variable {name}", _shortened(value)


def secret_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables whose names suggest a secret, with values long enough to be one."""
    environment = os.environ if environment is None else environment
    return {
        name: value for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not Path(value).exists()
    }  # fmt: skip


def masked(text: str) -> str:
    """A text with all secrets, and the values of keys that hold tokens, replaced by "…"."""
    for value in secret_variables().values():
        text = text.replace(value, "…")
    for pattern in SECRETS.values():
        text = re.sub(pattern, "…", text)
    return re.sub(r"(?m)^(\s*\w*_token: )\S+$", r"\1…", text)


def in_file(path: Path, name: str) -> Iterator[str]:
    """What a file would leak, as lines that name the place. Only the metadata of weight files is read."""
    private = path.name not in VOCABULARY
    for place, text in _texts(path):
        for what, shown in find(text, private):
            yield f"{name}{place} has {what}: {shown!r}"


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of all text in a file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield from _strings(file.metadata() or {}, ": metadata")
    elif path.suffix == ".parquet":
        table = pq.read_table(path)
        for key, value in (table.schema.metadata or {}).items():
            yield f": metadata {key.decode()}", value.decode(errors="replace")
        for batch in table.to_batches(1000):
            for row in batch.to_pylist():
                yield from ((place, text) for place, text in _strings(row, ": row"))
    elif path.name in VOCABULARY or path.suffix not in TEXT | {".json"}:
        yield "", path.read_bytes().decode(errors="replace")
    elif path.suffix == ".json":
        yield from _strings(json.loads(path.read_text(encoding="utf-8")), ": ")
    else:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f":{number}", line


def _strings(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}".replace(": .", ": "))
            yield key, str(name)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, f"{key}.{number}".replace(": .", ": "))


def _shortened(text: str) -> str:
    return text[:6] + "…"
