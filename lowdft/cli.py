"""The command line: `lowdft VERB RECIPE [section.key=value …]`. A stage is imported when its verb is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
import warnings

from lowdft import __version__
from lowdft.errors import UserError
from lowdft.training.preemption import Stopped, on_sigterm, stop

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
WHOLE_WAY = ("generate", "score", "train", "evaluate", "report", "export")
ROUNDS_ALONE = "rounds is {}: `run` walks them in one process only; under a launcher run each round's recipe by itself"
LAUNCHERS = ("ddp", "fsdp", "zero2", "zero3")
OPTIONS = {  # of stages, by the names of their arguments
    "generate": ("push_negatives",),
    "report": ("beside",),
    "export": ("push", "dry_run", "merged", "extrapolate"),
}
ON_ALL_RANKS = ("generate", "score", "train")  # under a launcher; rank 0 alone does the rest
VERBS = {
    "run": "walk the whole way: " + ", ".join(WHOLE_WAY),
    "generate": "let the base write negatives for every prompt",
    "score": "score the negatives under the frozen base, once",
    "train": "train the adapter, or go on from the last checkpoint",
    "evaluate": "measure base and adapter on the held-out rows",
    "report": "curves, tables and samples on one page",
    "export": "make the adapter publishable, with its card; --push uploads it",
    "plan": "say what a training will take: memory, steps, tokens; --probe times a pass",
    "compare": "run a study: one recipe over a grid of settings, side by side in one table",
    "inspect": "show rows as the model sees them, and a summary of the data",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done; 1: a user's mistake (told on standard error); 2: a wrong command; 130: Ctrl-C; 143: SIGTERM. After the last
    two the same command goes on.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    overrides = list(arguments.overrides)
    if arguments.skip_invalid:
        overrides.append("data.skip_invalid=true")
    try:
        with on_sigterm(lambda: stop("stopped by SIGTERM; the same command goes on from here")):
            if getattr(arguments, "launch", None) or getattr(arguments, "processes", None):
                _launch(arguments, overrides)
            _call(arguments, overrides)
    except Stopped as stopped:
        return stopped.code
    except UserError as error:
        print(f"lowdft: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"lowdft: {error.filename or 'a file'}: could not be written ({error.strerror}). What was finished is "
            "kept; free some space and run the same command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nlowdft: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Checks the recipe once, then becomes the launcher of the same command."""
    from lowdft.config.recipe import load_recipe, training_config
    from lowdft.distributed import launch

    if arguments.launch is None:
        raise UserError(f"--processes goes with --launch, one of {', '.join(LAUNCHERS)}")
    recipe = load_recipe(arguments.recipe, overrides)
    training_config(recipe)
    if recipe.rounds > 1 and arguments.verb == "run":
        raise UserError(ROUNDS_ALONE.format(recipe.rounds))
    name = getattr(arguments, "push", None) or getattr(arguments, "push_negatives", None)
    push = ["--push", name] if name else []
    launch.become(arguments.launch, arguments.processes, [arguments.verb, arguments.recipe, *overrides, *push])


def _call(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if arguments.verb == "compare":
        _quiet()
        from lowdft import study

        study.main(arguments.recipe, overrides)
        return
    from lowdft.config.recipe import load_recipe, rounds_of

    recipe = load_recipe(arguments.recipe, overrides)
    _quiet()
    from lowdft.pipeline.context import Run, say

    if arguments.verb == "run" and recipe.rounds > 1:
        if recipe.adapter is None:
            raise UserError(f"rounds is {recipe.rounds}: they go from adapter to adapter, but `adapter: null` has none")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(ROUNDS_ALONE.format(recipe.rounds))
        for number, one in enumerate(rounds_of(recipe), 1):
            say(f"round {number} of {recipe.rounds}: {one.output_dir}")
            _walk(Run(one), WHOLE_WAY, arguments)
        return
    run = Run(recipe)
    if arguments.verb == "inspect":
        importlib.import_module("lowdft.pipeline.stages.inspect").main(run, row=arguments.row)
    elif arguments.verb == "plan":
        importlib.import_module("lowdft.pipeline.stages.plan").main(
            run, gpu=arguments.gpu, gpus=arguments.gpus, probe=arguments.probe
        )
    else:
        _walk(run, WHOLE_WAY if arguments.verb == "run" else (arguments.verb,), arguments)


def _walk(run, stages: tuple[str, ...], arguments: argparse.Namespace) -> None:
    from lowdft.distributed import collectives
    from lowdft.models.base import whole_weights

    run.check()
    for stage in stages:
        if stage not in ON_ALL_RANKS and collectives.rank() > 0:
            return  # nothing after it needs more than one
        with contextlib.nullcontext() if stage == "train" else whole_weights():
            options = {name: getattr(arguments, name) for name in OPTIONS.get(stage, ()) if hasattr(arguments, name)}
            importlib.import_module(f"lowdft.pipeline.stages.{stage}").main(run, **options)


def _quiet() -> None:
    """Leaves the terminal to lowdft's own lines and progress: the libraries' loading bars and notices stay off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowdft", description="Discriminative Fine-Tuning on one ordinary GPU.")
    parser.add_argument("--version", action="version", version=f"lowdft {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("recipe", help="a YAML recipe (compare: a study), see recipes/")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of recipe keys")
        verb.add_argument("--skip-invalid", action="store_true", help="drop rows with errors, and count them")
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
        if name == "generate":
            verb.add_argument(
                "--push", dest="push_negatives", metavar="NAME", help="upload the negatives to the Hub as a data set"
            )
        if name == "report":
            verb.add_argument(
                "--beside", action="append", default=[], metavar="RUN", help="draw another run folder's curves too"
            )
        if name == "export":
            verb.add_argument("--dry-run", action="store_true", help="show the files, their sizes and the card only")
            verb.add_argument("--merged", action="store_true", help="the merged model in place of the adapter")
            verb.add_argument("--extrapolate", type=float, metavar="A", help="scale the adapter by 1 + A (ExPO)")
        if name in ("run", "export"):
            verb.add_argument("--push", metavar="NAME", help="upload it to the Hub under this name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
