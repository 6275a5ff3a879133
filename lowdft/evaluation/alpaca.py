"""AlpacaEval 2 (arXiv 2404.04475): writes answers in the format of its judge; judging needs a paid model."""

from __future__ import annotations

import json
from pathlib import Path

from lowdft.errors import UserError

NAME = "alpaca_eval"
DATA_SET, FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"
JUDGE = "alpaca_eval --model_outputs {} --annotators_config weighted_alpaca_eval_gpt4_turbo"


def instructions(path: str | None, limit: int | None) -> list[dict]:
    """The rows of AlpacaEval, from a local JSON or JSON Lines file, or else from the Hub.

    Raises:
        UserError: the file does not exist, or the Hub cannot be reached.
    """
    if path is None:
        path = _download()
    if not Path(path).is_file():
        raise UserError(f"evaluation.benchmark_data.{NAME} is {path}; there is no such file")
    text = Path(path).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    lacking = next((n for n, row in enumerate(rows) if "instruction" not in row), None)
    if lacking is not None:
        raise UserError(f"{path}: row {lacking} has no `instruction`; wanted rows of AlpacaEval")
    return rows[:limit]


def outputs(rows: list[dict], texts: list[str], generator: str) -> list[dict]:
    """Answers in the format of alpaca_eval's --model_outputs."""
    return [
        {"dataset": row.get("dataset", NAME), "instruction": row["instruction"], "output": text,
         "generator": generator}
        for row, text in zip(rows, texts, strict=True)
    ]  # fmt: skip


def _download() -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(DATA_SET, FILE, repo_type="dataset")
    except Exception as error:  # every network library has its own kinds
        told = (str(error).splitlines() or [""])[0][:160]
        raise UserError(
            f"{NAME}: {FILE} of the data set {DATA_SET} could not be fetched ({told}). Download that file elsewhere "
            f"and give its path: evaluation.benchmark_data.{NAME}=FILE"
        ) from error
