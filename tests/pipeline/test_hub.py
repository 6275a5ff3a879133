"""Uploads against a stand-in server: what arrives, what stays here, and what people are told when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file
from stand_in_hub import TOKEN, StandIn

from lowdft.errors import UserError
from lowdft.pipeline import hub, leaks

PUSH = """
import json, sys
from pathlib import Path
from lowdft.errors import UserError
from lowdft.pipeline import hub

files, _ = hub.select(Path(sys.argv[1]))
out = []
for name in sys.argv[2:]:
    kind, _, name = name.rpartition(":")
    try:
        out.append(hub.push(files, name, private=True, kind=kind or "model"))
    except UserError as error:
        out.append(str(error))
print(json.dumps(out))
"""


@pytest.fixture
def server():
    """The stand-in, in a thread."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter's files, and what must never leave beside them."""
    folder = tmp_path / "adapter"
    (folder / "notes").mkdir(parents=True)
    save_file({"a": torch.arange(4.0)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "README.md").write_text("---\ntags:\n- lowdft\n---\n# card\n")
    (folder / ".env").write_text("HF_TOKEN=x")
    (folder / "notes" / "README.md").write_text("mine")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    return folder


def push(folder, endpoint: str, *names: str, token: str = TOKEN) -> list[str]:
    """`hub.push` in a process of its own: the endpoint is read when huggingface_hub is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
        "HF_HOME": str(folder.parent / "home"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", PUSH, str(folder), *names]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_only_named_files_leave_and_never_a_link(adapter):
    files, left = hub.select(adapter)
    assert [file.name for file in files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert left == [".env", "notes/README.md", "tokenizer.json", "training_args.bin"]
    assert "  8 B  adapter_config.json" in hub.listing(files) and "in 3 files" in hub.listing(files)


def test_uploads_are_compared_and_failures_explained(adapter, server):
    server.repositories["me/other"] = {"model.safetensors": b"another's"}
    first, again, data, taken, forbidden = push(
        adapter, server.endpoint, "me/tiny", "me/tiny", "dataset:me/rows", "me/other", "someone-else/tiny"
    )
    assert first == again == f"{server.endpoint}/me/tiny" and data == f"{server.endpoint}/datasets/me/rows"
    assert server.created[0]["visibility"] == "private" and server.created[1]["type"] == "dataset"
    arrived = server.repositories["me/tiny"]
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(arrived) - {".gitattributes"} == names
    assert all(arrived[name] == (adapter / name).read_bytes() for name in names)
    assert "repository already exists, with 1 files that lowdft did not make" in taken
    assert server.repositories["me/other"] == {"model.safetensors": b"another's"}
    assert "may not write there" in forbidden


def test_a_cut_upload_resumes(adapter, server):
    server.cut = 1
    cut, resumed = push(adapter, server.endpoint, "me/tiny", "me/tiny")
    assert "could not be pushed" in cut and "files that have arrived are not sent twice" in cut
    assert resumed == f"{server.endpoint}/me/tiny" and server.puts == 1
    assert server.repositories["me/tiny"]["adapter_config.json"] == b'{"r": 4}'


def test_a_bad_token_and_no_network(adapter, server):
    [bad] = push(adapter, server.endpoint, "me/tiny", token="hf_" + "wrong" * 7)
    assert "the token is missing or not valid" in bad and "hf auth login" in bad and server.repositories == {}
    server.server_close()
    [down] = push(adapter, "http://127.0.0.1:9", "me/tiny")
    assert "the Hub cannot be reached" in down and "Nothing is lost;" in down


def test_a_secret_stops_the_upload_before_any_request(adapter, monkeypatch):
    (adapter / "adapter_config.json").write_text(json.dumps({"note": {"key": "AKIA" + "ABCD" * 4}}))
    monkeypatch.setattr(hub, "HfApi", None)
    with pytest.raises(UserError, match="adapter_config.json: note.key has an AWS access key: 'AKIAAB…'"):
        hub.push(hub.select(adapter)[0], "me/tiny", private=True)


@pytest.mark.parametrize("what, text", [
    ("a Hugging Face token", "hf_" + "Ab1" * 11), ("an OpenAI or Anthropic key", "sk-proj-" + "x1Y" * 8),
    ("an AWS access key", "AKIA" + "ABCD" * 4), ("an AWS secret key", 'aws_secret_access_key = "' + "aB/+" * 10 + '"'),
    ("a GitHub token", "ghp_" + "a1" * 18), ("a Weights & Biases key", "WANDB_API_KEY=" + "0a" * 20),
    ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"), ("a password", "https://me:secret@example.org/x"),
    ("a local path", "/home/me/base"), ("a local path", "see ~/models"), ("a local path", "C:\\Users\\me"),
    ("an e-mail address", "ask me@example.org"),
])  # fmt: skip
def test_what_must_not_leave(what, text):
    assert what in [kind for kind, _ in leaks.find(f"x {text} y")]
    assert leaks.masked(text) != text or what in leaks.PRIVATE


@pytest.mark.parametrize("text", [
    "https://huggingface.co/someone/tiny", "someone/tiny", "and/or/else", "</think>", "model.layers.0", "1/2/3",
    "`P(y'|x)^(1/tau) / P_base(y'|x)`", "at revision 0123456789012345678901234567890123456789", "risk-averse-and-calm",
    '"eos_token": "<|im_end|>"',
])  # fmt: skip
def test_what_may_leave(text):
    assert list(leaks.find(text)) == []


def test_values_of_secret_variables_are_found_in_every_kind_of_file(adapter, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("MY_SERVICE_KEY", "correct-horse")
    monkeypatch.setenv("MY_KEYBOARD", "short")
    save_file({"a": torch.ones(1)}, adapter / "model.safetensors", metadata={"note": "correct-horse"})
    pq.write_table(pa.table({"negatives": [["fine", "a correct-horse"]]}), adapter / "rows.parquet")
    (adapter / "chat_template.jinja").write_text("line\n{{ 'correct-horse' }}")
    for name, place in [("model.safetensors", ": metadata.note"), ("rows.parquet", ": row.negatives.1"),
                        ("chat_template.jinja", ":2")]:  # fmt: skip
        [found] = leaks.in_file(adapter / name, name)
        assert found == f"{name}{place} has the value of the variable MY_SERVICE_KEY: 'correc…'"
    assert leaks.masked("key: correct-horse") == "key: …"
