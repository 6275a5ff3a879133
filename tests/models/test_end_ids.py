"""End tokens as the model's own settings have them, with and without its weights."""

from __future__ import annotations

import json

from helpers import make_llama, make_tokenizer
from transformers import GenerationConfig

from lowdft import DFTConfig, models
from lowdft.training.rows import encoder_for


def test_end_tokens_of_a_folder_and_of_its_model(tmp_path):
    source = models.Source(str(tmp_path), None, "folder", True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    assert models.generation_end_ids(source) == [5]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"eos_token_id": [5, 6]}}))
    assert models.generation_end_ids(source) == [5, 6]
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
    assert models.generation_end_ids(source) == [7, 8]
    model = make_llama()
    model.generation_config.eos_token_id = [1, 2]
    assert models.generation_end_ids(model) == [1, 2]
    assert models.end_ids(make_tokenizer(), model) == [1, 2]  # its eos_token alone is 2


def test_a_trainers_rows_have_the_models_limits_and_ends(tmp_path):
    model = make_llama()  # of 512 positions
    model.generation_config.eos_token_id = 1
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True)  # max_length 1024, max_prompt_length 512
    encoder = encoder_for(model, make_tokenizer(), args)
    assert (encoder.max_length, encoder.prompt_limit, encoder.end_ids) == (512, 384, [1, 2])
    row = encoder_for(model, None, args).row({"prompt_ids": [5] * 600, "completion_ids": [6] * 600})
    assert (len(row["prompt_ids"]), len(row["completion_ids"])) == (384, 128)
