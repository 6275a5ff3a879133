"""merge: the merged model is base + adapter, both ways are measured, and llama.cpp's converter is found or named."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import torch
from helpers import make_run_folder, say_other_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowdft import models
from lowdft.cli import main
from lowdft.errors import UserError
from lowdft.evaluation.drift import Predictions, agreement, kl, predict
from lowdft.pipeline.stages import merge

ROWS = [{"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10]}, {"prompt_ids": [5], "completion_ids": [11, 12]}]


def fake_converter(folder, fails=False) -> None:
    """A converter and a quantizer that write down how they were called."""
    script = "import sys, pathlib\n" + ("sys.exit('no such architecture')\n" if fails else "") + (
        "out = sys.argv[sys.argv.index('--outfile') + 1]\npathlib.Path(out).write_text(repr(sys.argv[1:]))\n"
    )  # fmt: skip
    (folder / "convert_hf_to_gguf.py").write_text(script)
    quantize = folder / "llama-quantize"
    code = "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(sys.argv[3])"
    quantize.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    quantize.chmod(0o755)


def test_the_merged_model_is_base_and_adapter(tmp_path, tiny_folder, capsys):
    run = make_run_folder(tmp_path, tiny_folder)
    assert main(["merge", str(run.folder)]) == 0
    folder = run.folder / "merged-bf16"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.dtype == torch.bfloat16 and saved.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == run.tokenizer.chat_template
    adapter = models.load_adapter(run.base(), run.training.path).merge_and_unload()
    for (name, merged), (_, exact) in zip(saved.named_parameters(), adapter.named_parameters(), strict=True):
        error = (merged.float() - exact).abs().max() / exact.abs().max()
        assert error < 2**-7, name
    text = "".join(path.read_text() for path in folder.glob("*.json"))
    assert str(tiny_folder) not in text and str(tmp_path) not in text
    found = json.loads((run.folder / "merge.json").read_text())
    assert set(found) == {"tokens", "adapter", "bf16"} and found["bf16"]["kl"] < 1e-2
    assert found["bf16"]["nll"] == pytest.approx(found["adapter"]["nll"], abs=0.02)
    assert "KL from the adapter" in capsys.readouterr().out

    assert main(["merge", str(run.folder)]) == 1
    assert "merged-bf16: this folder already exists; delete it" in capsys.readouterr().err


def test_both_ways_from_a_4bit_base(tmp_path, tiny_folder):
    run = make_run_folder(tmp_path, tiny_folder, model={"load_in_4bit": True})
    folder = merge.main(run, into="dequantized")
    found = json.loads((run.folder / "merge.json").read_text())
    assert found["dequantized"]["kl"] < found["bf16"]["kl"]  # it stands on the weights that the adapter was trained on
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(saved.config, "quantization_config")
    weights = run.base().model.layers[0].mlp.up_proj
    dense = run.base().dequantize().model.layers[0].mlp.up_proj.weight
    assert weights.weight.dtype == torch.uint8
    adapter = models.load_adapter(run.base().dequantize(), run.training.path)
    delta = adapter.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_delta_weight("default")
    torch.testing.assert_close(
        saved.model.layers[0].mlp.up_proj.weight.float(), dense.float() + delta, rtol=2**-7, atol=2**-9
    )


@pytest.mark.parametrize("nll, recommends", [(2.1, True), (2.0002, False), (1.9, False)])
def test_a_way_is_recommended_if_it_is_noticeably_better(nll, recommends, said):
    other = {"kl": 0.0, "agreement": 1.0}
    found = {"tokens": 9, "adapter": {"nll": 2.0}, "bf16": {"nll": nll, **other}, "dequantized": {"nll": 2.0, **other}}
    merge.report(found, "bf16")
    assert ("recommended: --into dequantized" in said()) == recommends


@pytest.mark.parametrize("change, words", [
    (lambda run: merge.main(run, into="dequantized"), "was not trained on a 4-bit base"),
    (lambda run: say_other_base(run, "other@1"), "trained on another base"),
])  # fmt: skip
def test_what_cannot_be_merged(tmp_path, tiny_folder, change, words):
    run = make_run_folder(tmp_path, tiny_folder)
    with pytest.raises(UserError, match=words):
        change(run)
        merge.main(run)
    assert not (run.folder / "merged-bf16").exists()


def test_a_whole_model_has_nothing_to_merge(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="there is no adapter to merge"):
        merge.main(make_run_folder(tmp_path, tiny_folder, adapter=False))


def test_gguf_without_a_converter_prints_the_commands(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    run = make_run_folder(tmp_path, tiny_folder)
    folder = merge.main(run, gguf="Q4_K_M")
    out = capsys.readouterr().out
    first, last = folder / "merged-bf16-bf16.gguf", folder / "merged-bf16-Q4_K_M.gguf"
    assert f"python $LLAMA_CPP_DIR/convert_hf_to_gguf.py {folder} --outtype bf16 --outfile {first}\n" in out
    assert f"llama-quantize {first} {last} Q4_K_M\n" in out
    assert (folder / "Modelfile").read_text() == 'FROM ./merged-bf16-Q4_K_M.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_gguf_with_a_converter(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    run = make_run_folder(tmp_path, tiny_folder)
    with pytest.raises(UserError, match="which has no convert_hf_to_gguf.py"):
        merge.main(run, gguf="q8_0")
    fake_converter(tmp_path)
    folder = merge.main(run, gguf="q8_0")  # the merged folder is there already, and is taken
    assert "'--outtype', 'q8_0'" in (folder / "merged-bf16-q8_0.gguf").read_text()
    merge.main(run, gguf="Q4_K_M")
    assert (folder / "merged-bf16-Q4_K_M.gguf").read_text() == "Q4_K_M"
    assert not (folder / "merged-bf16-bf16.gguf").exists()
    fake_converter(tmp_path, fails=True)
    with pytest.raises(UserError, match="no such architecture.*The merged model itself is complete"):
        merge.main(run, gguf="f16")
    assert not (folder / "merged-bf16-f16.gguf").exists()


def test_drift_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.8, 0.2]])
    ids = torch.tensor([0, 1])
    one, two = Predictions(p.log(), ids), Predictions(q.log(), ids)
    by_hand = (0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log()) + 0.9 * torch.tensor(9 / 8).log()
               + 0.1 * torch.tensor(0.5).log()) / 2  # fmt: skip
    assert kl(one, two) == pytest.approx(by_hand.item(), rel=1e-5)
    assert agreement(one, two) == 0.5  # a tie goes to the first
    assert two.nll == pytest.approx(-(torch.tensor(0.25).log() + torch.tensor(0.2).log()).item() / 2)


def test_predictions_are_those_of_the_completion(llama):
    found = predict(llama, ROWS, 4)
    assert found.ids_T.tolist() == [8, 9, 10, 11]
    logits = llama(input_ids=torch.tensor([[5, 11]])).logits
    torch.testing.assert_close(found.logps_TV[3], logits[0, 0].log_softmax(0).detach())
