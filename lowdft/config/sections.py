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
    license: str | None = None  # of the base, for the card; None: what the base's own card says
    hub_id: str | None = None  # what to call a local base in the exported adapter and its card
    load_in_4bit: bool = True  # NF4 with double quantization
    dequantize: bool = False  # hold the weights that NF4 stands for in `dtype`: dense speed and memory
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 where it is fast
    attn_implementation: str | None = None  # None: transformers chooses (SDPA where the model has it)
    trust_remote_code: bool = False
    chat_template: str | None = None  # Jinja; takes the place of the tokenizer's own

    @property
    def holds_4bit(self) -> bool:
        """Are the weights in 4 bit in memory?"""
        return self.load_in_4bit and not self.dequantize


@dataclass
class AdapterSection:
    """An adapter of peft; `adapter: null` trains all parameters.

    Every other field of peft's configuration of that type may stand beside these (`use_rslora: true`, `use_dora: true`,
    `modules_to_save: [...]`, `layers_to_transform: [...]`); loading the recipe gathers them in `options`.
    """

    type: str = "lora"  # or ia3, oft, loha, lokr, vera, shira
    r: int = 16  # of lora, loha, lokr, vera and shira
    alpha: int = 32  # of lora, loha and lokr
    dropout: float = 0.0  # of adapters that have one
    target_modules: Any = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSection:
    """Rows to train on and rows held out. Without `eval`, the last `eval_rows` rows of `train` are held out."""

    train: str = "???"
    eval: str | None = None
    split: str = "train"
    eval_split: str = "test"
    revision: str | None = None
    eval_revision: str | None = None  # of `eval`; None: the same as `revision`
    columns: dict[str, str] = field(default_factory=dict)
    prompt_style: Literal["chat", "direct"] = "chat"  # direct: string prompts as they are, no template
    system_prompt: str | None = None
    prompt_template: str | None = None  # text with {prompt}, e.g. "Question: {prompt}\nAnswer:"; for rows of text
    labels: Any = None  # classification: a list of texts, or auto (the completions that occur); the others: negatives
    train_rows: int | None = None
    eval_rows: int | None = None
    tune_rows: int | None = None  # the last of the training rows, held out in the others' place (`lowdft compare`)
    skip_invalid: bool = False


@dataclass
class NegativesSection:
    """How the base writes negatives. `source`: auto (ready ones if the rows have them), data or generate."""

    source: Literal["auto", "data", "generate"] = "auto"
    per_prompt: int | None = None  # None: as many as training will use, epochs * negatives_per_step
    eval_per_prompt: int | None = None  # for held-out rows; None: negatives_per_step
    strategy: Literal["direct", "chat", "good_system", "bad_system", "custom", "few_shot"] = "bad_system"
    system_prompt: str | None = None  # of the strategies with a system message; None: their own
    template: str | None = None  # of strategy custom: text with {prompt}
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 320
    seed: int = 0
    adapter: str | None = None  # a trained adapter: base + adapter writes the training rows' negatives
    backend: Literal["auto", "padded", "continuous", "vllm"] = "auto"  # auto: padded, or continuous by flash-attn
    batch_size: int | None = None  # samples at once; None: 32 on a CPU, on a GPU as many as half of its memory holds
    gpu_memory_utilization: float = 0.9  # the share of the GPU's memory that the backend vllm takes
    stop: list[str] = field(default_factory=list)  # texts: a negative ends before the first of them
    resample: int = 0  # tries to replace a negative that is empty, equals the completion or (keep: wrong) is right
    keep: Literal["all", "wrong"] = "all"  # wrong: right answers, as evaluation.answer checks them, are not negatives
    shots: int = 5  # of strategy few_shot: training rows, solved, that stand before the prompt
    push: str | None = None  # a Hub data set to upload them to
    private: bool = True


@dataclass
class EvaluationSection:
    """What is measured on the held-out rows, before and after."""

    answer: Literal["auto", "none", "number", "choice", "regex", "math"] = "auto"  # how a greedy answer is checked
    pattern: str | None = None  # of answer regex: its first group is the answer
    max_new_tokens: int = 256
    batch_size: int = 32
    samples_every: int = 0  # training steps between sample answers to a few held-out prompts; 0: none
    compare: dict[str, str] = field(default_factory=dict)  # name: run folder or adapter, measured beside this one
    benchmarks: list[str] = field(default_factory=list)  # suites (paper, math), alpaca_eval, or lm-eval's tasks
    benchmark_limit: int | None = None  # rows per task; None: all
    benchmark_data: dict[str, Any] = field(default_factory=dict)  # task: file of its rows, or {split: file}


@dataclass
class ExportSection:
    """Where the adapter goes beside the run folder."""

    push: str | None = None  # a Hub model name
    private: bool = True


@dataclass
class Recipe:
    """The whole recipe. `training` holds fields of `DFTConfig`."""

    output_dir: str = "???"
    rounds: int = 1  # of `lowdft run`: each begins where the last ended, with negatives that it writes anew
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection | None = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    negatives: NegativesSection = field(default_factory=NegativesSection)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    export: ExportSection = field(default_factory=ExportSection)
