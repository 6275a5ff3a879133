"""Tasks for lm-eval: GSM8K and MATH, zero-shot with MetaMath's prompt (arXiv 2309.12284), checked by math-verify."""

from __future__ import annotations

import re

from lowdft.evaluation.answers import checker

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step."
)
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
FINAL = re.compile(r"(?:the answer is|####)[:\s]*(.+?)\s*\.?\s*$", re.IGNORECASE | re.MULTILINE)


def final_answer(text: str) -> str:
    """The final answer of a solution, for math-verify: a boxed expression, or text after "The answer is" or "####"."""
    found = FINAL.findall(text)
    if "\\boxed" in text or not found:
        return text
    return found[-1] if "$" in found[-1] else f"${found[-1]}$"


def _judge(doc: dict, results: list[str]) -> dict[str, float]:
    truth = doc["answer"] if "question" in doc else doc["solution"]
    return {"accuracy": float(checker("math")(final_answer(results[0]), final_answer(truth)))}


def _prompt(doc: dict) -> str:
    return PROMPT.format(doc.get("question") or doc["problem"])


def _truth(doc: dict) -> str:
    return final_answer(doc.get("answer") or doc["solution"])


def _math(**_) -> dict:
    """The 5,000 test problems of MATH (Hendrycks et al. 2021), whose subjects are separate data sets on the Hub."""
    from datasets import concatenate_datasets, load_dataset

    parts = [load_dataset("EleutherAI/hendrycks_math", subject, split="test") for subject in SUBJECTS]
    return {"test": concatenate_datasets(parts)}


def _task(name: str, **data) -> dict:
    return {
        "task": name,
        **data,
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": _prompt,
        "doc_to_target": _truth,
        "process_results": _judge,
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["Instruction:", "Response:"], "do_sample": False, "max_gen_toks": 1024},
        "metadata": {"version": 1.0},
    }


TASKS = {
    "metamath_gsm8k": _task("metamath_gsm8k", dataset_path="openai/gsm8k", dataset_name="main"),
    "metamath_math": _task("metamath_math", dataset_path="EleutherAI/hendrycks_math", custom_dataset=_math),
}
