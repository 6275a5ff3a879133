"""chat and serve: base and adapter answer from one loaded model, line by line."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import make_run_folder
from transformers import AutoConfig

from lowdft import models
from lowdft.cli import main
from lowdft.errors import UserError
from lowdft.pipeline.stages import chat, serve


def talk(run, monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", str(run.folder)]) == 0


def saved(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def greedy(run, model, messages: list[dict], n: int) -> str:
    prompt = run.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    written = model.generate(prompt, max_new_tokens=n, do_sample=False, eos_token_id=2, pad_token_id=0)
    return run.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def test_both_answer_as_the_models_themselves_would(tmp_path, tiny_folder, monkeypatch, capsys):
    run, file = make_run_folder(tmp_path, tiny_folder), tmp_path / "talk.json"
    talk(run, monkeypatch, "/set temperature=0 max_new_tokens=6", "/system Be brief.", "/both", "9 or 10?", "Sure?",
         "/base", "Alone?", f"/save {file}")  # fmt: skip
    found = saved(file)
    assert [m["content"] for m in found["base"] if m["role"] == "user"] == ["9 or 10?", "Sure?", "Alone?"]
    assert [m["content"] for m in found["tuned"] if m["role"] == "user"] == ["9 or 10?", "Sure?"]
    assert found["settings"]["temperature"] == 0.0 and found["system"] == "Be brief."
    for name, folder in (("base", None), ("tuned", run.training.path)):
        model = models.load_adapter(run.base(), folder) if folder else run.base()
        messages = [{"role": "system", "content": "Be brief."}]
        for user, answer in zip(found[name][::2], found[name][1::2], strict=True):
            messages.append(user)
            assert answer["content"] == greedy(run, model, messages, 6)
            messages.append(answer)
    assert found["base"][1] != found["tuned"][1]
    out = capsys.readouterr().out
    assert out.count("\ntuned: ") == 2 and out.count("\nbase: ") == 3


def test_a_seed_gives_the_same_answer_again(tmp_path, tiny_folder, monkeypatch):
    run, answers = make_run_folder(tmp_path, tiny_folder), []
    for number, seed in enumerate((1, 1, 2)):
        file = tmp_path / f"{number}.json"
        talk(run, monkeypatch, f"/set temperature=1 seed={seed} max_new_tokens=8", "Hi", f"/save {file}")
        answers.append(saved(file)["tuned"][1]["content"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("line, words", [
    ("/bse", "/bse is not a command. Did you mean '/base'?"),
    ("/set temprature=1", "/set temprature: wanted one of temperature"),
    ("/set top_p=much", "/set top_p=much: wanted a number"),
    ("/set top_p=2", "top_p in (0, 1]"),
    ("/save", "/save needs a file name"),
    ("a" * 600, "the conversation with tuned has 6"),
    ("a" * 600, "the model's context is 512; type /clear"),
])  # fmt: skip
def test_a_mistake_ends_nothing(tmp_path, tiny_folder, monkeypatch, capsys, line, words):
    run, file = make_run_folder(tmp_path, tiny_folder), tmp_path / "talk.json"
    talk(run, monkeypatch, line, "/set max_new_tokens=2", "Hi", f"/save {file}", "/quit", "never read")
    assert words in capsys.readouterr().out
    assert [m["content"] for m in saved(file)["tuned"]][::2] == ["Hi"]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(tmp_path, tiny_folder, monkeypatch):
    run = make_run_folder(tmp_path, tiny_folder)
    model = models.load_adapter(run.base(), run.training.path)
    one, calls, forward = chat.Chat(run, model), [], model.get_base_model().forward

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.get_base_model(), "forward", interrupted)
    assert one.take("Hi") and one.take("/clear") and not one.conversations["tuned"]
    calls.clear()
    assert one.take("Hi")
    assert [m["role"] for m in one.conversations["tuned"]] == ["user", "assistant"]
    assert len(calls) == 4


def test_a_model_without_adapter_is_tuned_alone(tmp_path, tiny_folder, monkeypatch, capsys):
    run, file = make_run_folder(tmp_path, tiny_folder, adapter=False), tmp_path / "talk.json"
    talk(run, monkeypatch, "/base", "/set temperature=0 max_new_tokens=4", "Hi", f"/save {file}")
    assert "only /tuned" in capsys.readouterr().out
    found = saved(file)
    trained = models.load_base(models.Source(str(run.training.path), None, "", True), run.recipe.model)
    assert found["tuned"][1]["content"] == greedy(run, trained, found["tuned"][:1], 4)
    assert not torch.equal(trained.lm_head.weight, run.base().lm_head.weight)


def test_a_run_folder_that_is_none(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 1
    assert "this folder has no recipe.yaml" in capsys.readouterr().err


def test_nothing_trained_yet(tmp_path, tiny_folder):
    run = make_run_folder(tmp_path, tiny_folder)
    run.training.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="run `lowdft train RECIPE` first"):
        chat.main(run)


def test_serve_prints_the_command_of_vllm(tmp_path, tiny_folder, capsys):
    run = make_run_folder(tmp_path, tiny_folder)
    assert main(["serve", str(run.folder)]) == 0
    out = capsys.readouterr().out
    adapter = run.training.path
    assert f"vllm serve {tiny_folder} --enable-lora --max-lora-rank 8 --lora-modules tuned={adapter}" in out
    assert f"loads no adapters: run `lowdft merge {run.folder}`" in out
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 20'))
    run.training.finish(**run.training.facts())
    assert "--max-lora-rank 32" in " ".join(serve.vllm_command(run))
    run.recipe.model.load_in_4bit = True
    assert "--quantization bitsandbytes" in " ".join(serve.vllm_command(run))


@pytest.mark.parametrize("trained", ["merged", "whole"])
def test_serve_starts_the_server_of_transformers_on_a_whole_model(tmp_path, tiny_folder, monkeypatch, capsys, trained):
    run = make_run_folder(tmp_path, tiny_folder, adapter=trained == "merged")
    model = run.folder / ("model" if trained == "whole" else "merged-dequantized")
    model.mkdir(exist_ok=True)
    started, status = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr("subprocess.run", lambda line: started.append(line) or status)
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert main(["serve", str(run.folder)]) == 0
    assert f"transformers serve {model} --dtype float32\n" in capsys.readouterr().out and not started
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    assert main(["serve", str(run.folder)]) == 0
    assert started[0][1:] == ["-m", "transformers.cli.transformers", "serve", str(model), "--dtype", "float32"]
    status.returncode = 1
    assert main(["serve", str(run.folder)]) == 1 and "ended with status 1" in capsys.readouterr().err


def test_the_server_of_transformers_reads_no_adapter_folder(tmp_path, tiny_folder):
    """Why `serve` asks for a merged model; when this fails, it can serve the adapter itself."""
    run = make_run_folder(tmp_path, tiny_folder)
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(run.training.path)
