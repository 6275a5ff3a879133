"""Tiny models, tokenizers and rows, made in the test."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lowdft import DFTConfig, DFTTrainer
from lowdft.config.machine import computes_bfloat16
from lowdft.config.sections import AdapterSection, DataSection, ModelSection, Recipe
from lowdft.models import add_adapter
from lowdft.pipeline.artifact import Product
from lowdft.pipeline.context import Run
from lowdft.sampling import Request

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
needs_bfloat16 = pytest.mark.skipif(not computes_bfloat16(), reason="bfloat16 is emulated here: slow, and less exact")
VOCABULARY = 97
ROWS = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(12)]  # of the `recipe` fixture
COMMON = dict(  # of tiny models of every family
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tiny_model(folder: Path) -> None:
    """A tiny model and its tokenizer as a local transformers folder."""
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )


def make_llama(vocab_size: int = VOCABULARY, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of 32, float32, random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def sharp_llama():
    """A tiny model whose distributions are far from flat."""
    model = make_llama()
    model.lm_head.weight.data.mul_(8)
    return model


def make_requests(n: int = 13) -> list[Request]:
    """Requests with random prompts of 1 to 39 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (n,), generator=generator).tolist()
    prompts = [torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, 2**62 + i) for i, prompt in enumerate(prompts)]


def make_rows(n: int = 10, negatives: int = 4, seed: int = 0) -> list[dict]:
    """Rows of random ids with prompts, completions and negatives of different lengths."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(low, high))]

    return [
        {"prompt_ids": ids(2, 7), "completion_ids": ids(2, 7), "negative_ids": [ids(1, 7) for _ in range(negatives)]}
        for _ in range(n)
    ]


def lora(dropout: float = 0.0) -> LoraConfig:
    """A LoRA configuration for every linear layer."""
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)


def make_trainer(folder, rows=None, peft=True, dropout=0.0, eval_rows=None, **settings) -> DFTTrainer:
    """A trainer of a tiny model: two epochs, two micro-batches of two rows per step."""
    defaults = dict(
        objective="dft",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    args = DFTConfig(output_dir=str(folder), **(defaults | settings))
    return DFTTrainer(
        make_llama(),
        args,
        make_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        peft_config=lora(dropout) if peft else None,
    )


def say_other_base(run: Run, name: str) -> None:
    """Lets the manifest of a trained adapter name another base."""
    made = Product(run.training.path, run.training.made_from | {"base": name})
    made.finish(**run.training.facts())


def write_benchmark(folder: Path) -> None:
    """A benchmark.json of one task, as `lowdft benchmark` writes it."""
    after = {"value": 0.375, "stderr": None, "ahead": {"value": 0.125, "stderr": None, "paired": False}}
    task = {"shots": 5, "metric": "exact_match", "rows": 8, "systems": {"base": {"value": 0.25, "stderr": None},
                                                                        "after": after}}  # fmt: skip
    result = {"mean": {"base": 0.25, "after": 0.375}, "tasks": {"gsm8k": task}, "harness": "lm-eval 1", "limit": None}
    (folder / "benchmark.json").write_text(json.dumps(result))


def losses(trainer) -> list[float]:
    """The logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Preempt(TrainerCallback):
    """SIGTERM between two micro-batches of the step after `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def folder(recipe: str) -> Path:
    """The run folder of the `recipe` fixture."""
    return Path(recipe).parent / "run"


def metrics(recipe: str, keys=("step", "loss", "log_u/mean")) -> list[dict]:
    """Some keys of every line of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder(recipe) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys} for line in lines]


def make_run_folder(folder: Path, base: Path, adapter: bool = True, **sections) -> Run:
    """A run folder as training leaves it: six rows, the resolved recipe, a random adapter (or model)."""
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"{i} or {i + 1}?", "completion": f"{i + 1}"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name_or_path": str(base), "hub_id": "someone/tiny-llama", "load_in_4bit": False, "dtype": "float32"}
    run = Run(Recipe(
        output_dir=str(folder / "run"),
        model=ModelSection(**model | sections.pop("model", {})),
        adapter=AdapterSection(r=4, alpha=8) if adapter else None,
        data=DataSection(train=str(data), eval_rows=2),
        training={"max_length": 256, "max_prompt_length": 128, "use_cpu": True},
        **sections,
    ))  # fmt: skip
    run.check()
    run.training.begin()
    trained = add_adapter(run.base(), run.recipe.adapter, seed=0) if adapter else run.base()
    generator = torch.Generator().manual_seed(1)
    for name, weight in trained.named_parameters():
        if "lora_B" in name or not adapter:
            weight.data += 0.5 * torch.randn(weight.shape, generator=generator)
    trained.save_pretrained(run.training.path)
    run.tokenizer.save_pretrained(run.training.path)
    run.training.finish(steps=2, seconds=1.0)
    return run


def interrupt(monkeypatch, owner, name: str, call: int) -> list:
    """That call of the function raises as Ctrl-C does, the others do their work; clearing the list counts anew."""
    original, calls = getattr(owner, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    return calls
