"""export: the adapter (or model) made publishable where it stands, with its card; on request uploaded to the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from lowdft import __version__, models
from lowdft.config.sections import NegativesSection
from lowdft.data.prompting import SYSTEM_PROMPTS
from lowdft.errors import UserError
from lowdft.files import read_json, replacing, write_text
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.publishable import clean
from lowdft.reporting import evaluation_table

PAPER = "2502.18679"
# an absolute path of two parts or more, a home or Windows path, a file URL; or an access token of the Hub
LOCAL = re.compile(
    r"(?<![\w./<)\]}])/[\w.@+-]+/[\w.@+-]|(?<![\w/])~/\w|\b[A-Za-z]:\\[\w .-]+\\\w|\bfile://|\bhf_\w{20,}"
)
VOCABULARY = {"tokenizer.json", "vocab.json", "added_tokens.json"}  # tokens may look like paths


def main(run: Run, push: str | None = None, extrapolate: float | None = None) -> None:
    """Cleans configuration files, writes README.md, and uploads the folder when `push` or `export.push` names a place.

    Raises:
        UserError: nothing is trained, a file would tell a local path or a token, or the upload failed.
    """
    folder = run.training.path
    if not run.training.is_done():
        raise UserError(f"{folder}: is not there yet; run `lowdft train RECIPE` first, or `lowdft run RECIPE`")
    if extrapolate is not None:
        folder = extrapolated(run, folder, extrapolate)
    clean(folder, models.public_name(run.source, run.recipe.model), run.source.revision)
    write_text(folder / "README.md", str(card(run, extrapolate)))
    found = [f"{place} says {text!r}" for place, text in leaks(folder)]
    push = push or run.recipe.export.push
    if found and push:
        raise UserError(f"{folder}: not pushed, because it tells of this machine: {'; '.join(found)}. "
                        "Change that by hand, or train again with model.hub_id set.")  # fmt: skip
    for line in found:
        say(f"warning: {folder}: {line}; `--push` will refuse this")
    say(f"{folder}: ready to publish, with README.md")
    if push:
        say(f"pushed to {upload(folder, push, run.recipe.export.private)}")


def extrapolated(run: Run, folder: Path, by: float) -> Path:
    """A copy of the adapter whose change of the base is (1 + by) times as large: theta1 + by (theta1 - theta0).

    Exact for LoRA, whose change is linear in B ("Model Extrapolation", ExPO; it takes 0.3 to 0.5).

    Raises:
        UserError: there is no LoRA adapter, or training started from another one than a fresh one.
    """
    if run.recipe.adapter is None or run.args.reference_adapter:
        raise UserError("--extrapolate scales a LoRA adapter that training began afresh; this run has none")
    target = folder.with_name(f"{folder.name}-extrapolated")
    with replacing(target) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        weights = load_file(folder / "adapter_model.safetensors")
        scaled = {k: v * (1 + by) if "lora_B" in k else v for k, v in weights.items()}
        save_file(scaled, Path(temporary) / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


# ---- files ----------------------------------------------------------------------------------------------------------


def leaks(folder: Path) -> Iterator[tuple[str, str]]:
    """(file and key, text) of every string that looks like a local path or an access token."""
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder)
        if path.suffix == ".md":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if LOCAL.search(line):
                    yield f"{where}:{number}", line.strip()[:120]
        elif path.suffix == ".json" and path.name not in VOCABULARY:
            for key, text in _strings(json.loads(path.read_text(encoding="utf-8")), ""):
                if LOCAL.search(text):
                    yield f"{where}: {key}", text[:120]


def _strings(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for k, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, f"{key}.{k}".lstrip("."))


def upload(folder: Path, name: str, private: bool) -> str:
    """Creates the repository where it is missing and uploads the folder; gives its address."""
    try:
        api = HfApi()
        repo = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=f"lowdft {__version__}")
    except Exception as error:  # every network library has its own kinds
        told = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{name}: could not be pushed ({type(error).__name__}: {told}). Nothing is lost: {folder} is whole. Check "
            "the name, the network (HF_HUB_OFFLINE must not be set) and that you are logged in (`hf auth login`, or "
            "HF_TOKEN) with the right to write there; then run `lowdft export RECIPE --push NAME` again."
        ) from error
    return str(repo)


# ---- card -----------------------------------------------------------------------------------------------------------


def card(run: Run, extrapolate: float | None = None) -> ModelCard:
    """The model card: what this is, how to load it, what it was made from, what it measured."""
    name = models.public_name(run.source, run.recipe.model)
    full = run.recipe.adapter is None
    on_hub = "/" in name
    tags = ["transformers", "dft", "discriminative-fine-tuning", "lowdft", f"arxiv:{PAPER}"]
    tags = tags if full else ["lora", *tags, *([f"base_model:adapter:{name}"] if on_hub else [])]
    data = ModelCardData(
        base_model=name if on_hub else None,  # a bare name would point at a stranger's model
        library_name="transformers" if full else "peft", pipeline_tag="text-generation", tags=tags,
        datasets=[run.recipe.data.train.partition(":")[0]] if _hub_data(run) else None,
    )  # fmt: skip
    sections = [_what(run, name), _loading(run, name), _data(run), _training(run), _evaluation(run), _versions(run)]
    if extrapolate is not None:
        sections.insert(
            1,
            f"**Extrapolated**: the adapter's change of the base is {1 + extrapolate:g} times that of training "
            f"(ExPO with a = {extrapolate:g}). What was measured below is the adapter as trained.",
        )
    return ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", *filter(None, sections), CITATION]) + "\n")


EQUATIONS = {
    "dft": "`-log P(y|x) + tau * log u(x)`, where `u(x)` is a moving average (step gamma) of the mean over the "
    "negatives y' of `P(y'|x)^(1/tau) / P_base(y'|x)`. In words: raise the probability of the completion, and lower "
    "that of each negative in proportion to how likely it still is against the base.",
    "dft2": "`-s(y|x) + tau * log u(x)`, where `s` is the mean log-probability of a token and `u(x)` a moving average "
    "(step gamma) of the mean over the negatives y' of `exp(s(y'|x) / tau)`. In words: raise the score of the "
    "completion, and lower that of each negative in proportion to how high it still is; no reference model.",
    "sft": "`-log P(y|x)`, averaged over the tokens of the completions; no negatives.",
}


def _what(run: Run, name: str) -> str:
    section, objective = run.recipe.model, run.objective
    base = f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}` (a local model)"
    if run.source.revision:
        base += f" at revision `{run.source.revision}`"
    local = f" The weights used were a local copy ({run.source.identity})." if run.source.is_local else ""
    weights = "4-bit NF4 with double quantization" if section.load_in_4bit else f"dense {section.dtype}"
    what = "A LoRA adapter for" if run.recipe.adapter else "A full-parameter fine-tune of"
    equation = EQUATIONS.get(objective.name, "")
    equation = equation and f" The loss of a prompt x with completion y: {equation}"
    return (f"# {run.folder.resolve().name}\n\n{what} {base}, trained on the base in {weights} with lowdft.{local}\n\n"
            f"Objective: `{objective.name}` ({objective.source}).{equation}\n\n"
            f"> DFT here is **Discriminative Fine-Tuning** ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), "
            "not *Dynamic* Fine-Tuning.\n\n"
            "The licence of the base applies to what is derived from it; see the base's own card.")  # fmt: skip


def _loading(run: Run, name: str) -> str:
    base, revision = (name, run.source.revision) if "/" in name else (f"FOLDER_OF_{name}", None)
    pin = f', revision="{revision}"' if revision else ""
    here = "THIS_REPOSITORY_OR_FOLDER"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if run.recipe.adapter:
        lines = ["from peft import PeftModel", *lines, f'base = AutoModelForCausalLM.from_pretrained("{base}"{pin})',
                 f'model = PeftModel.from_pretrained(base, "{here}")']  # fmt: skip
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{here}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{here}")')
    return "## Loading\n\n```python\n" + "\n".join(lines) + "\n```"


def _hub_data(run: Run) -> bool:
    """Is the training data a data set of the Hub, rather than a file or a toy?"""
    name = run.recipe.data.train
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", name)) and not Path(name).exists() \
        and not re.search(r"\.[A-Za-z]\w*$", name)  # fmt: skip


def _data(run: Run) -> str:
    section, name = run.recipe.negatives, run.recipe.data.train
    source = "a local file"
    if _hub_data(run):
        source = f"`{name}` (split `{run.recipe.data.split}`)"
    elif name.startswith("toy:"):
        source = f"the toy data `{name}`"
    rows = f"## Data\n\n{len(run.examples('train'))} rows of {source}; {len(run.examples('heldout'))} rows held out."
    if not run.objective.uses_negatives:
        return f"{rows} No negatives."
    if run.ready_negatives():
        return f"{rows} The rows bring their own negatives."
    product = run.negatives("train")
    counts = product.facts() if product.manifest.is_file() else {}
    told = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items() if key != "seconds")
    settings = _sampling_words(section)
    return f"{rows}\n\nNegatives were written by the base itself: {settings}." + (f" Counted: {told}." if told else "")


def _sampling_words(section: NegativesSection) -> str:
    asked = section.template if section.strategy == "custom" else ""
    if section.strategy in SYSTEM_PROMPTS:
        asked = section.system_prompt or SYSTEM_PROMPTS[section.strategy]
    words = asked and f' ("{" ".join(asked.split())}")'
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
        "batch a device": args.per_device_train_batch_size, "gradient accumulation": args.gradient_accumulation_steps,
        "learning rate": args.learning_rate, "schedule": args.lr_scheduler_type.value, "warm-up": args.warmup_steps,
        "optimizer": args.optim.value,
        "weight decay": args.weight_decay, "max_length": args.max_length, "max_prompt_length": args.max_prompt_length,
        "seed": args.seed,
    }  # fmt: skip
    rows = [[key, f"`{value}`"] for key, value in values.items() if value is not None]
    return "## Training\n\n" + _markdown(["", "value"], rows)


def _evaluation(run: Run) -> str | None:
    if not ((run.folder / "evaluation.json").is_file() and run.evaluation.is_done()):
        return None
    evaluation = read_json(run.folder / "evaluation.json")
    title, table = evaluation_table.title(evaluation), _markdown(*evaluation_table.cells(evaluation))
    return f"## Evaluation\n\nOn {title}.\n\n{table}"


def _versions(run: Run) -> str:
    packages = ["torch", "transformers", "peft", *(["bitsandbytes"] if run.recipe.model.load_in_4bit else [])]
    return "## Versions\n\n" + ", ".join([f"lowdft {__version__}", *(f"{p} {version(p)}" for p in packages)])


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


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
