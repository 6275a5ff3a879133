"""A recipe's sections as dataclasses: their keys, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

STUDY_KEYS = ("recipe", "output_dir", "set", "grid", "spread", "paper", "baselines", "sft_learning_rates", "tune_rows")


@dataclass
class ModelSection:
    """The base: a local folder, a Hub name, a .gguf file, or package:NAME/FILE.gguf of an installed Python package."""

    name_or_path: str = "???"
    revision: str | None = None
    license: str | None = None  # of the base, for the model card; None: as in the base's model card
    hub_id: str | None = None  # public name of a local base, for the exported adapter and its model card
    load_in_4bit: bool = True  # NF4 with double quantization
    dequantize: bool = False  # keep the dequantized NF4 weights in `dtype`: speed and memory of a dense base
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 if it is fast, else float32
    attn_implementation: str | None = None  # None: transformers chooses (SDPA if the model supports it)
    trust_remote_code: bool = False
    chat_template: str | None = None  # Jinja; replaces the tokenizer's chat template

    @property
    def holds_4bit(self) -> bool:
        """Whether the weights in memory are in 4 bit."""
        return self.load_in_4bit and not self.dequantize


@dataclass
class AdapterSection:
    """A peft adapter; `adapter: null` trains all parameters.

    You can add every other field of peft's configuration of that type (`use_rslora: true`, `use_dora: true`,
    `modules_to_save: [...]`, `layers_to_transform: [...]`); loading the recipe moves them to `options`. With
    `type: shira`, `mask_type: gradient` trains the weights that have the largest gradients on the first rows (SIFT).
    """

    type: str = "lora"  # or ia3, oft, loha, lokr, vera, shira
    r: int = 16  # for lora, loha, lokr, vera and shira
    alpha: int = 32  # for lora, loha and lokr
    dropout: float = 0.0  # for adapter types that have one
    target_modules: Any = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSection:
    """Training rows and held-out rows. Without `eval`, the last `eval_rows` rows of `train` are held out."""

    train: str = "???"
    eval: str | None = None
    split: str = "train"
    eval_split: str = "test"
    revision: str | None = None
    eval_revision: str | None = None  # of `eval`; None: the same as `revision`
    columns: dict[str, str] = field(default_factory=dict)
    prompt_style: Literal["chat", "direct"] = "chat"  # direct: string prompts are used without the chat template
    system_prompt: str | None = None
    prompt_template: str | None = None  # text around string prompts, e.g. "Question: {prompt}\nAnswer:"
    labels: Any = None  # classification: a list of labels, or auto; a row's other labels become its negatives
    train_rows: int | None = None
    eval_rows: int | None = None
    tune_rows: int | None = None  # hold out the last N training rows instead of the eval rows (`lowdft compare`)
    skip_invalid: bool = False


@dataclass
class NegativesSection:
    """How negatives are made. `source`: data (from the rows), generate (from the base) or auto (data if there are)."""

    source: Literal["auto", "data", "generate"] = "auto"
    per_prompt: int | None = None  # None: as many as training will use, epochs * negatives_per_step
    eval_per_prompt: int | None = None  # for held-out rows; None: negatives_per_step
    strategy: Literal["direct", "chat", "good_system", "bad_system", "custom", "few_shot"] = "bad_system"
    system_prompt: str | None = None  # for strategies with a system message; None: the strategy's default
    template: str | None = None  # for strategy custom: text with {prompt}
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 320
    seed: int = 0
    adapter: str | None = None  # a trained adapter: sample the training rows' negatives from base + adapter
    backend: Literal["auto", "padded", "continuous", "vllm"] = "auto"  # auto: padded, or continuous with flash-attn
    batch_size: int | None = None  # samples at once; None: 32 on a CPU, on a GPU as many as half of its memory holds
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for the backend vllm
    stop: list[str] = field(default_factory=list)  # texts; a negative ends before the first one that occurs
    resample: int = 0  # attempts to replace a negative that is empty, equals the completion or (keep: wrong) is right
    keep: Literal["all", "wrong"] = "all"  # wrong: right answers, as checked by evaluation.answer, are not negatives
    shots: int = 5  # for strategy few_shot: how many solved training rows come before the prompt
    push: str | None = None  # name of a Hub data set to upload them to
    private: bool = True


@dataclass
class EvaluationSection:
    """What is measured on the held-out rows, before and after training."""

    answer: Literal["auto", "none", "number", "choice", "regex", "math"] = "auto"  # how a greedy answer is checked
    pattern: str | None = None  # for answer regex: its first group is the answer
    max_new_tokens: int = 256
    batch_size: int = 32
    samples_every: int = 0  # answer a few held-out prompts every N training steps; 0: never
    compare: dict[str, str] = field(default_factory=dict)  # name: run folder or adapter, to be measured as well
    benchmarks: list[str] = field(default_factory=list)  # suites (paper, math), alpaca_eval, or tasks of lm-eval
    benchmark_limit: int | None = None  # rows per task; None: all
    benchmark_data: dict[str, Any] = field(default_factory=dict)  # task: file with its rows, or {split: file}


@dataclass
class ExportSection:
    """Where to upload the adapter."""

    push: str | None = None  # a Hub model name
    private: bool = True


@dataclass
class Recipe:
    """The whole recipe. `training` holds fields of `DFTConfig`."""

    output_dir: str = "???"
    rounds: int = 1  # for `lowdft run`: each round starts from the last round's model, which samples new negatives
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection | None = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    negatives: NegativesSection = field(default_factory=NegativesSection)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    export: ExportSection = field(default_factory=ExportSection)
