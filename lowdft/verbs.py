"""The verbs (subcommands) of the command line and their arguments."""

from __future__ import annotations

import argparse

from lowdft import __version__

WHOLE_WAY = ("generate", "score", "train", "evaluate", "benchmark", "report", "export")
LAUNCHERS = ("ddp", "fsdp", "zero2", "zero3")
ON_ALL_RANKS = ("generate", "score", "train")  # under a launcher; rank 0 alone does the rest
VERBS = {
    "init": "write a first recipe from a model and a file of rows",
    "run": "run every stage: " + ", ".join(WHOLE_WAY),
    "generate": "sample negatives for every prompt from the base",
    "score": "score the negatives under the frozen base, once",
    "train": "train the adapter, or resume from the last checkpoint",
    "evaluate": "measure base and adapter on the held-out rows",
    "benchmark": "measure base and adapter on public benchmarks (lm-evaluation-harness)",
    "report": "write curves, tables and samples to one HTML page",
    "export": "prepare the adapter for publishing, with a model card; --push uploads it",
    "probe": "estimate in a few minutes whether negatives will help on these rows, and which objective to use",
    "plan": "estimate the memory, steps and tokens that training takes; --probe also times a pass",
    "chat": "talk to base and adapter in the terminal, from one loaded model",
    "serve": "print the command that serves the base and the adapter; start a server for merged models",
    "merge": "merge the adapter into the base; --gguf converts the result for llama.cpp and Ollama",
    "compare": "run a study: one recipe over a grid of settings, compared in one table",
    "doctor": "report what this machine supports, and how to fix what is missing",
    "inspect": "show rows as the model sees them, and a summary of the data",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Overrides may come before and after options, which argparse alone does not support."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line: one sub-parser per verb."""
    parser = argparse.ArgumentParser(prog="lowdft", description="Discriminative Fine-Tuning on one ordinary GPU.")
    parser.add_argument("--version", action="version", version=f"lowdft {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what)
        if name in ("init", "doctor"):
            _of_start(verb, name)
            continue
        verb.add_argument("recipe", help="a YAML recipe (for compare, a study) or a run folder")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe keys to override")
        verb.add_argument("--skip-invalid", action="store_true", help="drop invalid rows and report how many")
        verb.add_argument("--trust-remote-code", action="store_true", help="allow model.trust_remote_code")
        if name in ("run", "train"):
            trust = "resume from a checkpoint even if loading it may run code in it"
            verb.add_argument("--trust-checkpoint", action="store_true", help=trust)
        if name in ("run", "generate"):
            verb.add_argument("--push-negatives", action="store_true", help="upload the negatives to negatives.push")
        if name in ("run", *ON_ALL_RANKS):
            verb.add_argument("--launch", choices=LAUNCHERS, help="run on all GPUs: full copies (ddp) or sharded")
            verb.add_argument(
                "--processes", type=int, metavar="N", help="how many with --launch (default: one per GPU)"
            )
        if name == "inspect":
            verb.add_argument("--row", type=int, default=0, metavar="N", help="which row to show, from 0")
        if name == "probe":
            verb.add_argument("--rows", type=int, default=128, metavar="N", help="rows of each split (default: 128)")
        if name == "plan":
            verb.add_argument("--gpu", type=float, metavar="GB", help="list the settings that fit in this GPU memory")
            verb.add_argument(
                "--gpus", type=int, default=1, metavar="N", help="plan for N GPUs: ZeRO-3, or full copies"
            )
            verb.add_argument("--probe", action="store_true", help="load the base, time a pass and estimate the hours")
        if name == "generate":
            verb.add_argument("--push", dest="push_data", metavar="NAME", help="upload the negatives as a Hub data set")
        if name == "report":
            verb.add_argument("--beside", action="append", default=[], metavar="RUN", help="also draw this run folder")
        if name == "benchmark":
            verb.add_argument("--tasks", metavar="NAMES", help="suites (paper, math), lm-eval tasks; comma-separated")
            verb.add_argument("--limit", type=int, metavar="N", help="use the first N rows of every task")
        if name == "merge":
            into = "merge into the base's original weights in bfloat16, or into the dequantized 4-bit weights"
            verb.add_argument("--into", choices=("bf16", "dequantized"), default="bf16", help=into)
            verb.add_argument("--gguf", metavar="TYPE", help="also write a GGUF file: f16, bf16, q8_0, …")
        if name == "export":
            verb.add_argument("--dry-run", action="store_true", help="only show the files, their sizes and the card")
            merged = "export the model that `lowdft merge` wrote instead of the adapter"
            verb.add_argument("--merged", choices=("bf16", "dequantized"), help=merged)
            verb.add_argument("--extrapolate", type=float, metavar="A", help="scale the adapter by 1 + A (ExPO)")
        if name in ("run", "export"):
            verb.add_argument("--push", metavar="NAME", help="upload the result to the Hub under this name")
    return parser


def _of_start(verb: argparse.ArgumentParser, name: str) -> None:
    """Arguments of the verbs that take no recipe."""
    if name == "init":
        verb.add_argument("model", help="a Hub name, a folder or a .gguf file")
        verb.add_argument("data", help="a file of rows, or a Hub data set")
        verb.add_argument("--output", default="recipe.yaml", metavar="FILE", help="the recipe to write")
        verb.add_argument("--gpu", type=float, metavar="GB", help="choose settings that fit in this GPU memory")
