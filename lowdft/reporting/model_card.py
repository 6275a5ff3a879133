"""The model card: what the model is, how to load it, what it was made from, and its evaluation."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from lowdft import __version__, models
from lowdft.config.sections import NegativesSection
from lowdft.data.prompting import SYSTEM_PROMPTS
from lowdft.files import read_json
from lowdft.files.packages import SCHEME
from lowdft.pipeline.context import Run
from lowdft.reporting import benchmark_table, evaluation_table, run_page
from lowdft.reporting.markdown import block, code, plain, table

PAPER = "2502.18679"


def card(run: Run, repository: str | None = None, extrapolate: float | None = None, merged: bool = False) -> ModelCard:
    """The card of a run's adapter, or of the merged model, for the repository of that name."""
    name = models.public_name(run.source, run.recipe.model)
    whole, on_hub = merged or run.recipe.adapter is None, "/" in name
    tags = ["transformers", "dft", "discriminative-fine-tuning", "lowdft", f"arxiv:{PAPER}"]
    tags = tags if whole else ["lora", *tags, *([f"base_model:adapter:{name}"] if on_hub else [])]
    known = base_card(run)
    data = ModelCardData(
        base_model=name if on_hub else None,  # a local name could be that of somebody else's model on the Hub
        library_name="transformers" if whole else "peft", pipeline_tag="text-generation", tags=tags,
        datasets=[run.recipe.data.train.partition(":")[0]] if _hub_data(run) else None,
        language=known.get("language"), **_licence(run, known),
    )  # fmt: skip
    sections = [
        _what(run, name, data.license, merged), _extrapolated(extrapolate), _loading(run, name, repository, whole),
        _data(run), _training(run), _evaluation(run), _benchmarks(run), _versions(run),
    ]  # fmt: skip
    return ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", *filter(None, sections), CITATION]) + "\n")


def _licence(run: Run, known: dict) -> dict[str, str]:
    """The recipe's licence, or else the base's, with its name and link."""
    if run.recipe.model.license:
        return {"license": run.recipe.model.license}
    return {key: known[key] for key in ("license", "license_name", "license_link") if key in known}


def missing(run: Run) -> list[str]:
    """What is missing in the card, and how to add it."""
    found = []
    known = base_card(run)
    if not (run.recipe.model.license or known.get("license")):
        found.append("the licence (the base's card is not available: set model.license)")
    if not known.get("language"):
        found.append("the language (the base's card does not name it)")
    if "/" not in models.public_name(run.source, run.recipe.model):
        found.append("the base's name on the Hub (set model.hub_id)")
    if _evaluation(run) is None:
        found.append("an evaluation (run `lowdft evaluate RECIPE`)")
    if _benchmarks(run) is None:
        found.append("benchmarks (run `lowdft benchmark RECIPE`)")
    return found


def base_card(run: Run) -> dict:
    """The metadata of the base's card, from its folder or the Hub's local cache; {} if it is not available."""
    path = Path(run.source.path) / "README.md"
    if not path.is_file():
        name = models.public_name(run.source, run.recipe.model)
        cached = (
            try_to_load_from_cache(name, "README.md", revision=run.source.revision) if name.count("/") == 1 else None
        )
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    try:
        return ModelCard.load(path).data.to_dict()
    except ValueError:  # no metadata, or not YAML
        return {}


EQUATIONS = {
    "dft": "`-log P(y|x) + tau * log u(x)`, where `u(x)` is a moving average (step gamma) of the mean over the "
    "negatives y' of `P(y'|x)^(1/tau) / P_base(y'|x)`. In words: raise the probability of the completion, and lower "
    "that of each negative in proportion to how likely it still is relative to the base.",
    "dft2": "`-s(y|x) + tau * log u(x)`, where `s` is the mean log-probability per token and `u(x)` a moving average "
    "(step gamma) of the mean over the negatives y' of `exp(s(y'|x) / tau)`. In words: raise the score of the "
    "completion, and lower that of each negative in proportion to how high it still is; no reference model.",
    "sft": "`-log P(y|x)`, averaged over the tokens of the completions; no negatives.",
}


def _what(run: Run, name: str, license: str | None, merged: bool) -> str:
    section, objective = run.recipe.model, run.objective
    base = f"[{plain(name)}](https://huggingface.co/{name})" if "/" in name else f"{code(name)} (a local model)"
    if run.source.revision:
        base += f" at revision {code(run.source.revision)}"
    local = f" The weights used were a local copy ({run.source.identity})." if run.source.is_local else ""
    weights = "4-bit NF4 with double quantization" if section.load_in_4bit else f"dense {section.dtype}"
    what = "A LoRA adapter for" if run.recipe.adapter else "A full-parameter fine-tune of"
    what = "A LoRA adapter merged into" if merged else what
    equation = EQUATIONS.get(objective.name, "")
    equation = equation and f" The loss of a prompt x with completion y: {equation}"
    told = f"The base's licence is {code(license)}; it" if license else "The licence of the base"
    return (f"# {plain(run.folder.resolve().name)}\n\n{what} {base}, trained on the base in {weights} with lowdft."
            f"{local}\n\nObjective: `{objective.name}` ({objective.source}).{equation}\n\n"
            f"> DFT here is **Discriminative Fine-Tuning** ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), "
            "not *Dynamic* Fine-Tuning.\n\n"
            f"{told} applies to models derived from it; see the base's card.")  # fmt: skip


def _extrapolated(by: float | None) -> str | None:
    if by is None:
        return None
    return (
        f"**Extrapolated**: the trained adapter was scaled by {1 + by:g} (ExPO with a = {by:g}). The results below are "
        "those of the adapter as trained."
    )


NF4 = """nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{dtype}
)"""
CHAT = """messages = {messages}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens={tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
DIRECT = """inputs = tokenizer("Your prompt here", return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens={tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _loading(run: Run, name: str, repository: str | None, whole: bool) -> str:
    section = run.recipe.model
    where = repository or run.recipe.export.push or run.training.path.name
    parts = []
    if section.load_in_4bit and not whole:
        parts.append("As it was trained and evaluated, on the base in 4 bit (NF4):\n\n"
                     + block(_load(run, name, where, whole, "nf4"), "python"))  # fmt: skip
        parts.append("In bfloat16 (its results differ from those below):\n\n"
                     + block(_load(run, name, where, whole, "bfloat16"), "python"))  # fmt: skip
    else:
        dtype = "bfloat16" if section.load_in_4bit else section.dtype
        parts.append(block(_load(run, name, where, whole, dtype), "python"))
    tokens = run.recipe.evaluation.max_new_tokens
    example = DIRECT.format(tokens=tokens)
    if run.recipe.data.prompt_style == "chat":
        system = run.recipe.data.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "Your question here"})
        example = CHAT.format(messages=json.dumps(messages, ensure_ascii=False), tokens=tokens)
    return "\n\n".join(["## Loading", *parts, "## Usage", block(example, "python")])


def _load(run: Run, name: str, where: str, whole: bool, dtype: str) -> str:
    """The lines that load tokenizer and model."""
    base, revision = (name, run.source.revision) if "/" in name else (f"FOLDER_OF_{name}", None)
    pin = f", revision={json.dumps(revision)}" if revision else ""
    how = "quantization_config=nf4" if dtype == "nf4" else f"dtype=torch.{dtype}"
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if dtype == "nf4" else "")
    lines = [
        "import torch",
        *([] if whole else ["from peft import PeftModel"]),
        f"from transformers import {imports}",
        "",
    ]
    lines += [NF4.format(dtype=run.recipe.model.dtype)] if dtype == "nf4" else []
    if whole:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({json.dumps(where)}, {how})")
    else:
        lines += [f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{pin}, {how})",
                  f"model = PeftModel.from_pretrained(base, {json.dumps(where)})"]  # fmt: skip
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(where)})"])


def _hub_data(run: Run) -> bool:
    """Whether the training data is a data set on the Hub, not a file or the toy task."""
    name = run.recipe.data.train
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", name)) and not Path(name).exists() \
        and not re.search(r"\.[A-Za-z]\w*$", name)  # fmt: skip


def _data(run: Run) -> str:
    section, name = run.recipe.negatives, run.recipe.data.train
    source = "a local file"
    if _hub_data(run):
        source = f"{code(name)} (split {code(run.recipe.data.split)})"
    elif name.startswith("toy:"):
        source = f"the toy data {code(name)}"
    elif name.startswith(SCHEME):
        source = f"a file of a Python package, {code(name)}"
    rows = f"## Data\n\n{len(run.examples('train'))} rows of {source}; {len(run.examples('heldout'))} rows held out."
    if not run.objective.uses_negatives:
        return f"{rows} No negatives."
    if run.ready_negatives():
        return f"{rows} The rows have their own negatives."
    product = run.negatives("train")
    counts = product.facts() if product.manifest.is_file() else {}
    told = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items() if key != "seconds")
    settings = sampling_words(section)
    return f"{rows}\n\nNegatives were sampled from the base: {settings}." + (f" Counted: {told}." if told else "")


def sampling_words(section: NegativesSection) -> str:
    """How negatives were sampled, as Markdown."""
    asked = section.template if section.strategy == "custom" else ""
    if section.strategy in SYSTEM_PROMPTS:
        asked = section.system_prompt or SYSTEM_PROMPTS[section.strategy]
    words = asked and f" ({code(asked)})"
    return (
        f"strategy `{section.strategy}`{words}, temperature {section.temperature:g}, top_p {section.top_p:g}, "
        f"top_k {section.top_k}, at most {section.max_new_tokens} new tokens, seed {section.seed}"
    )


def _training(run: Run) -> str:
    args, adapter = run.args, run.recipe.adapter
    facts = run.training.facts()
    values = {"objective": run.objective.name, **args.hyperparameters()}
    if run.objective.uses_negatives:
        values["negatives_per_step"] = args.negatives_per_step
    if run.objective.uses_log_u:
        values["log_u_init"] = args.log_u_init
    if run.objective.uses_reference:
        values |= {"reference": args.reference, "reference_prompt": args.reference_prompt}
    if adapter:
        values |= {"lora r": adapter.r, "lora alpha": adapter.alpha, "lora dropout": adapter.dropout,
                   "lora target modules": adapter.target_modules}  # fmt: skip
    values |= {
        "steps": facts.get("steps"), "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "batch per device": args.per_device_train_batch_size, "gradient accumulation": args.gradient_accumulation_steps,
        "learning rate": args.learning_rate, "schedule": args.lr_scheduler_type.value, "warm-up": args.warmup_steps,
        "optimizer": args.optim.value,
        "weight decay": args.weight_decay, "max_length": args.max_length, "max_prompt_length": args.max_prompt_length,
        "seed": args.seed, "hardware": facts.get("hardware"), "time": _time(run, facts),
    }  # fmt: skip
    return "## Training\n\n" + table(["", "value"], [[k, code(v)] for k, v in values.items() if v is not None])


def _time(run: Run, facts: dict) -> str | None:
    path = run.folder / "metrics.jsonl"
    seconds = run_page.seconds_of(run_page.read_metrics(path)) if path.is_file() else 0
    seconds = seconds or facts.get("seconds")
    return run_page.duration(seconds) if seconds else None


def _evaluation(run: Run) -> str | None:
    if not ((run.folder / "evaluation.json").is_file() and run.evaluation.is_done()):
        return None
    evaluation = read_json(run.folder / "evaluation.json")
    header, rows = evaluation_table.cells(evaluation)
    shown = table([plain(name) for name in header], [[plain(cell) for cell in row] for row in rows])
    return f"## Evaluation\n\nOn {evaluation_table.title(evaluation)}.\n\n{shown}"


def _benchmarks(run: Run) -> str | None:
    path = run.folder / "benchmark.json"
    if not path.is_file():
        return None
    found = read_json(path)
    header, rows = benchmark_table.cells(found)
    shown = table([plain(name) for name in header], [[plain(cell) for cell in row] for row in rows])
    return f"## Benchmarks\n\n{plain(benchmark_table.notes(found))}.\n\n{shown}"


def _versions(run: Run) -> str:
    packages = ["transformers", "peft", *(["bitsandbytes"] if run.recipe.model.load_in_4bit else [])]
    found = (f"{package} {version(package)}" for package in packages)
    return "## Versions\n\n" + ", ".join([f"lowdft {__version__}", f"torch {torch.__version__}", *found])


CITATION = f"""## Citation

```bibtex
@misc{{guo2025discriminative,
  title         = {{Discriminative Finetuning of Generative Large Language Models without Reward Models and Human Preference Data}},
  author        = {{Siqi Guo and Ilgee Hong and Vicente Balmaseda and Changlong Yu and Liang Qiu and Xin Liu and Haoming Jiang and Tuo Zhao and Tianbao Yang}},
  year          = {{2025}},
  eprint        = {{{PAPER}}},
  archivePrefix = {{arXiv}}
}}
```"""  # noqa: E501
