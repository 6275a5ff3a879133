"""The vLLM backend against a stand-in of the same interface: one child process, which gives everything back."""

from __future__ import annotations

import json
import os

import pytest
from helpers import TESTS

from lowdft.cli import main
from lowdft.errors import UserError
from lowdft.sampling import Request, Sample, SamplingSettings, VllmModel, get_sampler

SETTINGS = SamplingSettings(temperature=0.7, top_k=0, max_new_tokens=5)
REQUESTS = [Request([5, 6], 21), Request([7], 2**62)]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What the stand-in's engines were made with, once it is in vLLM's place."""
    monkeypatch.syspath_prepend(str(TESTS / "fakes"))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "log.jsonl"))
    return lambda: [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def make_sampler(**model):
    return get_sampler("vllm", VllmModel("someone/base", **model), [2], SETTINGS, 64)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_child_serves_all_parts_and_ends_with_the_sampler(log):
    sampler = make_sampler(load_in_4bit=True, max_length=832, memory=0.8)
    assert sampler.sample([]) == []
    for _ in range(2):
        assert sampler.sample(REQUESTS) == [Sample([6, 1, 0, -1], "length"), Sample([7, 4, 0, -1], "stop")]
    (engine,) = log()
    pid = engine.pop("pid")
    assert pid != os.getpid() and is_running(pid)
    assert engine == {
        "model": "someone/base", "revision": None, "dtype": "bfloat16", "max_num_seqs": 64, "max_model_len": 832,
        "gpu_memory_utilization": 0.8, "quantization": "bitsandbytes", "generation_config": "vllm",
        "trust_remote_code": False,
    }  # fmt: skip
    del sampler
    assert not is_running(pid)


def test_an_adapter_is_served_with_its_rank(log, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 20, "modules_to_save": None}))
    sampler = make_sampler(adapter=str(tmp_path))
    assert sampler.sample(REQUESTS[:1]) == [Sample([6, 1, 1, -1], "length")]
    (engine,) = log()
    assert engine["enable_lora"] and engine["max_lora_rank"] == 32 and "quantization" not in engine
    for config, words in (
        ({"r": 1024}, "vLLM allows 512"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            make_sampler(adapter=str(tmp_path))


def test_failures_are_told(log):
    with pytest.raises(
        UserError, match="vLLM failed: ValueError: Free memory on device is less than desired. A smaller"
    ):
        make_sampler(memory=0.99).sample(REQUESTS)
    with pytest.raises(UserError, match="its process was killed"):
        make_sampler().sample([Request([13], 1)])


def test_generate_with_vllm(log, tmp_path, tiny_folder):
    """Through the stage: two splits, one engine, lengths and memory from the recipe."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 2}}\n"
        "negatives: {backend: vllm, max_new_tokens: 6, gpu_memory_utilization: 0.5}\n"
        "training: {use_cpu: true, max_prompt_length: 100}\n"
    )
    assert main(["generate", str(tmp_path / "recipe.yaml")]) == 0
    (engine,) = log()
    assert engine["max_model_len"] == 106 and engine["gpu_memory_utilization"] == 0.5
    assert engine["quantization"] == "bitsandbytes" and not is_running(engine["pid"])
    assert (tmp_path / "run" / "negatives.parquet").is_file()
    assert main(["train", str(tmp_path / "recipe.yaml"), "negatives.gpu_memory_utilization=2"]) == 1
