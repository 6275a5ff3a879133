"""The command line: `lowdft VERB RECIPE [section.key=value …]`. A stage is imported when its verb is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import warnings

from lowdft import __version__
from lowdft.errors import UserError
from lowdft.text import printable
from lowdft.training.preemption import Stopped, on_sigterm, stop

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
WHOLE_WAY = ("generate", "score", "train", "evaluate", "benchmark", "report", "export")
ROUNDS_ALONE = "rounds is {}: `run` walks them in one process only; under a launcher run each round's recipe by itself"
LAUNCHERS = ("ddp", "fsdp", "zero2", "zero3")
ON_ALL_RANKS = ("generate", "score", "train")  # under a launcher; rank 0 alone does the rest
READING = ("inspect", "plan", "chat", "serve")  # verbs that write no run folder
ALONE = {  # stages with arguments of their own
    "benchmark": lambda given: {"names": given.tasks and given.tasks.split(","), "limit": given.limit},
    "chat": lambda given: {},
    "serve": lambda given: {},
    "merge": lambda given: {"into": given.into, "gguf": given.gguf},
}
VERBS = {
    "run": "walk the whole way: " + ", ".join(WHOLE_WAY),
    "generate": "let the base write negatives for every prompt",
    "score": "score the negatives under the frozen base, once",
    "train": "train the adapter, or go on from the last checkpoint",
    "evaluate": "measure base and adapter on the held-out rows",
    "benchmark": "measure base and adapter on public benchmarks (lm-evaluation-harness), in one load",
    "report": "curves, tables and samples on one page",
    "export": "make the adapter publishable, with its card; --push uploads it",
    "plan": "say what a training will take: memory, steps, tokens; --probe times a pass",
    "chat": "talk to base and adapter in the terminal, from one loaded model",
    "serve": "print the commands that serve the base and the adapter",
    "merge": "write the base with the adapter merged into it; --gguf converts it for llama.cpp and Ollama",
    "compare": "run a study: one recipe over a grid of settings, side by side in one table",
    "inspect": "show rows as the model sees them, and a summary of the data",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done; 1: a user's mistake (told on standard error); 2: a wrong command; 130: Ctrl-C; 143: SIGTERM. After the last
    two the same command goes on.
    """
    # before torch loads: CUDA's allocator then grows blocks instead of fragmenting (8-10% of an H100's memory)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    parser = _parser()
    arguments = parser.parse_args(argv)
    overrides = list(arguments.overrides)
    if arguments.skip_invalid:
        overrides.append("data.skip_invalid=true")
    try:
        with on_sigterm(lambda: stop("stopped by SIGTERM; the same command goes on from here")):
            if arguments.verb not in READING:
                _check_free(arguments, overrides)
            if getattr(arguments, "launch", None) or getattr(arguments, "processes", None):
                return _launch(arguments, overrides)
            _as_a_rank()
            _call(arguments, overrides)
    except Stopped as stopped:
        return stopped.code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nlowdft: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if words := _words(error):
            print(f"lowdft: {printable(words)}", file=sys.stderr)
            return 1
        raise
    return 0


def _words(error: Exception) -> str | None:
    """What to tell people about an error, or None when a traceback is the best that can be shown."""
    if isinstance(error, UserError):
        return str(error)
    from lowdft.files import write_error

    failed = write_error(None, error)
    numbered = not isinstance(error, OSError) or error.errno in DISK_ERRORS
    return str(failed) if failed and numbered else None


def _check_free(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Says within a second that another process holds the run folder; what is imported later takes longer."""
    from lowdft.config.recipe import output_dir_of
    from lowdft.files import check_free

    if folder := output_dir_of(arguments.recipe, [] if arguments.verb == "compare" else overrides):
        check_free(folder)


def _as_a_rank() -> None:
    """One of several processes ends with its launcher, and takes Ctrl-C once: terminal and launcher both send it."""
    if "LOCAL_RANK" not in os.environ:
        return
    from lowdft.distributed.launch import die_with_launcher

    def interrupt(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    die_with_launcher()
    signal.signal(signal.SIGINT, interrupt)


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Checks the recipe once, then runs the same command on several processes."""
    from lowdft.config.recipe import load_recipe, training_config
    from lowdft.distributed import launch

    if arguments.launch is None:
        raise UserError(f"--processes goes with --launch, one of {', '.join(LAUNCHERS)}")
    recipe, doors = load_recipe(arguments.recipe, overrides), _doors(arguments)
    doors.check(recipe)
    training_config(recipe)
    if recipe.rounds > 1 and arguments.verb == "run":
        raise UserError(ROUNDS_ALONE.format(recipe.rounds))
    push = ["--push", arguments.push] if getattr(arguments, "push", None) else []
    line = [arguments.verb, arguments.recipe, *overrides, *push, *doors.arguments()]
    return launch.launch(arguments.launch, arguments.processes, line)


def _doors(arguments: argparse.Namespace):
    from lowdft.config.doors import Doors

    return Doors(**{name: getattr(arguments, name, False) for name in Doors.__dataclass_fields__})


def _call(arguments: argparse.Namespace, overrides: list[str]) -> None:
    doors = _doors(arguments)
    if arguments.verb == "compare":
        _quiet()
        from lowdft import study

        study.main(arguments.recipe, overrides, doors)
        return
    from lowdft.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    doors.check(recipe)
    _quiet()
    from lowdft.files import locked
    from lowdft.pipeline.context import Run

    if arguments.verb in ("run", "export"):
        recipe.export.push = arguments.push or recipe.export.push
    if arguments.verb == "inspect":
        importlib.import_module("lowdft.pipeline.stages.inspect").main(Run(recipe), row=arguments.row)
    elif arguments.verb == "plan":
        importlib.import_module("lowdft.pipeline.stages.plan").main(
            Run(recipe), gpu=arguments.gpu, gpus=arguments.gpus, probe=arguments.probe
        )
    elif arguments.verb in READING:
        _alone(arguments, Run(recipe))
    else:
        with locked(recipe.output_dir):
            _write(arguments, recipe, doors)


def _write(arguments: argparse.Namespace, recipe, doors) -> None:
    """The verbs that write the run folder, which this process holds."""
    from lowdft.config.recipe import rounds_of
    from lowdft.pipeline.context import Run, say

    def run_of(one) -> Run:
        run = Run(one)
        run.trust_checkpoint, run.push_negatives = doors.trust_checkpoint, doors.push_negatives
        return run

    if arguments.verb == "run" and recipe.rounds > 1:
        if recipe.adapter is None:
            raise UserError(f"rounds is {recipe.rounds}: they go from adapter to adapter, but `adapter: null` has none")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(ROUNDS_ALONE.format(recipe.rounds))
        for number, one in enumerate(rounds_of(recipe), 1):
            say(f"round {number} of {recipe.rounds}: {one.output_dir}")
            _walk(run_of(one), _stages(one))
    elif arguments.verb == "export":
        run = run_of(recipe)
        run.check()
        importlib.import_module("lowdft.pipeline.stages.export").main(run, extrapolate=arguments.extrapolate)
    elif arguments.verb in ALONE:
        _alone(arguments, run_of(recipe))
    else:
        _walk(run_of(recipe), _stages(recipe) if arguments.verb == "run" else (arguments.verb,))


def _alone(arguments: argparse.Namespace, run) -> None:
    stage = importlib.import_module(f"lowdft.pipeline.stages.{arguments.verb}")
    stage.main(run, **ALONE[arguments.verb](arguments))


def _stages(recipe) -> tuple[str, ...]:
    """The stages of `lowdft run`: benchmarks only if the recipe names some."""
    return tuple(stage for stage in WHOLE_WAY if stage != "benchmark" or recipe.evaluation.benchmarks)


def _walk(run, stages: tuple[str, ...]) -> None:
    from lowdft.distributed import collectives
    from lowdft.models.base import release_memory, whole_weights

    run.check()
    for stage in stages:
        if stage not in ON_ALL_RANKS and collectives.rank() > 0:
            return  # nothing after it needs more than one
        with contextlib.nullcontext() if stage == "train" else whole_weights():
            importlib.import_module(f"lowdft.pipeline.stages.{stage}").main(run)
        release_memory()


class Lines(logging.Handler):
    """Prints lowdft's log as plain lines on standard output; of several ranks the first speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line."""
        from lowdft.distributed import collectives

        if collectives.rank() == 0:
            print(printable(self.format(record)), flush=True)


def _quiet() -> None:
    """Leaves the terminal to lowdft's own lines and progress: the libraries' loading bars and notices stay off."""
    log = logging.getLogger("lowdft")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [Lines()], False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowdft", description="Discriminative Fine-Tuning on one ordinary GPU.")
    parser.add_argument("--version", action="version", version=f"lowdft {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("recipe", help="a YAML recipe (compare: a study), or a run folder")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of recipe keys")
        verb.add_argument("--skip-invalid", action="store_true", help="drop rows with errors, and count them")
        verb.add_argument("--trust-remote-code", action="store_true", help="allow model.trust_remote_code")
        if name in ("run", "train"):
            verb.add_argument("--trust-checkpoint", action="store_true", help="resume even if that may run its code")
        if name in ("run", "generate"):
            verb.add_argument("--push-negatives", action="store_true", help="upload them to negatives.push")
        if name in ("run", *ON_ALL_RANKS):
            verb.add_argument("--launch", choices=LAUNCHERS, help="run on all GPUs: whole copies (ddp) or sharded")
            verb.add_argument("--processes", type=int, metavar="N", help="how many with --launch, if not one a GPU")
        if name == "inspect":
            verb.add_argument("--row", type=int, default=0, metavar="N", help="which row to show (from 0)")
        if name == "plan":
            verb.add_argument("--gpu", type=float, metavar="GB", help="find the largest setting for a GPU's memory")
            verb.add_argument(
                "--gpus", type=int, default=1, metavar="N", help="plan for N GPUs: ZeRO-3, or whole copies"
            )
            verb.add_argument("--probe", action="store_true", help="load the base, time a pass, and estimate the hours")
        if name == "benchmark":
            verb.add_argument("--tasks", metavar="NAMES", help="suites (paper, math) and lm-eval's tasks, with commas")
            verb.add_argument("--limit", type=int, metavar="N", help="the first N rows of every task")
        if name == "merge":
            into = "which weights to merge into: the base's own in bfloat16, or what its 4-bit form stands for"
            verb.add_argument("--into", choices=("bf16", "dequantized"), default="bf16", help=into)
            verb.add_argument("--gguf", metavar="TYPE", help="also write a GGUF file: f16, bf16, q8_0, …")
        if name == "export":
            verb.add_argument("--extrapolate", type=float, metavar="A", help="scale the adapter by 1 + A (ExPO)")
        if name in ("run", "export"):
            verb.add_argument("--push", metavar="NAME", help="upload the adapter to the Hub under this name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
