"""The command line: `lowdft VERB RECIPE [section.key=value …]`. Each stage is imported when its verb is called."""

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

from lowdft.errors import UserError
from lowdft.text import printable
from lowdft.training.preemption import Stopped, on_sigterm, stop
from lowdft.verbs import LAUNCHERS, ON_ALL_RANKS, WHOLE_WAY, parse

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
ROUNDS_ALONE = "rounds is {}: rounds run in one process only; with a launcher, run a separate recipe for each round"
OPTIONS = {  # arguments that a stage takes from the command line
    "generate": ("push_data",),
    "report": ("beside",),
    "export": ("push", "dry_run", "merged", "extrapolate"),
}
READING = ("inspect", "plan", "chat", "serve")  # verbs that do not write to the run folder
ALONE = {  # stages outside `run`, and the arguments of their `main`
    "benchmark": lambda given: {"names": given.tasks and given.tasks.split(","), "limit": given.limit},
    "chat": lambda given: {},
    "serve": lambda given: {},
    "merge": lambda given: {"into": given.into, "gguf": given.gguf},
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: success; 1: an error of the user, printed on standard error; 2: an invalid command line; 130: Ctrl-C; 143:
    SIGTERM. After the last two the same command resumes.
    """
    # set before torch loads, so that CUDA's allocator grows blocks instead of fragmenting (8-10% of an H100's memory)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    arguments = parse(argv)
    if arguments.verb in ("init", "doctor"):
        return _start(arguments)
    overrides = list(arguments.overrides)
    if arguments.skip_invalid:
        overrides.append("data.skip_invalid=true")
    try:
        with on_sigterm(lambda: stop("stopped by SIGTERM; run the same command again to resume")):
            if arguments.verb not in READING:
                _check_free(arguments, overrides)
            if getattr(arguments, "launch", None) or getattr(arguments, "processes", None):
                return _launch(arguments, overrides)
            _as_a_rank()
            _call(arguments, overrides)
    except Stopped as stopped:
        _leave_group()
        return stopped.code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nlowdft: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except Exception as error:
        if words := _words(error):
            print(f"lowdft: {printable(words)}", file=sys.stderr)
            return 1
        raise
    _leave_group()
    return 0


def _start(arguments: argparse.Namespace) -> int:
    """Runs the verbs that take no recipe."""
    _quiet()
    stage = importlib.import_module(f"lowdft.start.{arguments.verb}")
    if arguments.verb == "doctor":
        return stage.main()
    try:
        stage.main(arguments.model, arguments.data, arguments.output, arguments.gpu)
    except UserError as error:
        print(f"lowdft: {printable(error)}", file=sys.stderr)
        return 1
    return 0


def _words(error: Exception) -> str | None:
    """The message for an error, or None if a traceback is more useful."""
    if isinstance(error, UserError):
        return str(error)
    from lowdft.files import write_error

    failed = write_error(None, error)
    numbered = not isinstance(error, OSError) or error.errno in DISK_ERRORS
    return str(failed) if failed and numbered else None


def _check_free(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Reports a locked run folder within a second, before slow imports."""
    from lowdft.config.recipe import output_dir_of
    from lowdft.files import check_free

    if folder := output_dir_of(arguments.recipe, [] if arguments.verb == "compare" else overrides):
        check_free(folder)


def _as_a_rank() -> None:
    """Makes a launched process end with its launcher, and handle Ctrl-C once: terminal and launcher both send it."""
    if "LOCAL_RANK" not in os.environ:
        return
    from lowdft.distributed.launch import die_with_launcher

    def interrupt(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    die_with_launcher()
    signal.signal(signal.SIGINT, interrupt)


def _leave_group() -> None:
    """Ends a rank's communication: threads that outlive the interpreter would abort the process after its work."""
    if "LOCAL_RANK" in os.environ:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Checks the recipe once, then runs the same command on several processes."""
    _quiet()
    from lowdft.config.recipe import load_recipe, training_config
    from lowdft.distributed import launch

    if arguments.launch is None:
        raise UserError(f"--processes also needs --launch with one of {', '.join(LAUNCHERS)}")
    recipe, doors = load_recipe(arguments.recipe, overrides), _doors(arguments)
    doors.check(recipe)
    training_config(recipe)
    if recipe.rounds > 1 and arguments.verb == "run":
        raise UserError(ROUNDS_ALONE.format(recipe.rounds))
    name = getattr(arguments, "push", None) or getattr(arguments, "push_data", None)
    push = ["--push", name] if name else []
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

    recipe = load_recipe(arguments.recipe, overrides, for_gpu=getattr(arguments, "gpu", None) is not None)
    doors.check(recipe)
    _quiet()
    from lowdft.files import locked
    from lowdft.pipeline.context import Run

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
    """Runs the verbs that write to the run folder, which this process has locked."""
    from lowdft.config.recipe import rounds_of
    from lowdft.pipeline.context import Run, say

    def run_of(one) -> Run:
        run = Run(one)
        run.trust_checkpoint, run.push_negatives = doors.trust_checkpoint, doors.push_negatives
        return run

    if arguments.verb == "run" and recipe.rounds > 1:
        if recipe.adapter is None:
            raise UserError(
                f"rounds is {recipe.rounds}, but `adapter: null` trains no adapter for the next round to start from. "
                "Use an adapter, or set rounds: 1."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(ROUNDS_ALONE.format(recipe.rounds))
        for number, one in enumerate(rounds_of(recipe), 1):
            say(f"round {number} of {recipe.rounds}: {one.output_dir}")
            _walk(run_of(one), _stages(one), arguments)
    elif arguments.verb == "probe":
        importlib.import_module("lowdft.pipeline.stages.probe").main(run_of(recipe), rows=arguments.rows)
    elif arguments.verb in ALONE:
        _alone(arguments, run_of(recipe))
    else:
        _walk(run_of(recipe), _stages(recipe) if arguments.verb == "run" else (arguments.verb,), arguments)


def _alone(arguments: argparse.Namespace, run) -> None:
    stage = importlib.import_module(f"lowdft.pipeline.stages.{arguments.verb}")
    stage.main(run, **ALONE[arguments.verb](arguments))


def _stages(recipe) -> tuple[str, ...]:
    """The stages of `lowdft run`; benchmarks only if the recipe names any."""
    return tuple(stage for stage in WHOLE_WAY if stage != "benchmark" or recipe.evaluation.benchmarks)


def _walk(run, stages: tuple[str, ...], arguments: argparse.Namespace) -> None:
    from lowdft.distributed import collectives
    from lowdft.models.base import release_memory, whole_weights

    run.evaluation_follows = "evaluate" in stages
    run.check()
    for stage in stages:
        if stage not in ON_ALL_RANKS and collectives.rank() > 0:
            return  # nothing after it needs more than one
        with contextlib.nullcontext() if stage == "train" else whole_weights():
            options = {name: getattr(arguments, name) for name in OPTIONS.get(stage, ()) if hasattr(arguments, name)}
            importlib.import_module(f"lowdft.pipeline.stages.{stage}").main(run, **options)
        release_memory()


class Lines(logging.Handler):
    """Prints lowdft's log as plain lines on standard output, on rank 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line."""
        from lowdft.distributed import collectives

        if collectives.rank() == 0:
            print(printable(self.format(record)), flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what DeepSpeed says at every start on a CPU, whether it is used or not."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _quiet() -> None:
    """Turns off progress bars and notices of other libraries, so that the terminal shows only lowdft's output."""
    log = logging.getLogger("lowdft")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [Lines()], False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    shown: set[str] = set()

    def show(message, *_, **__) -> None:
        if str(message) not in shown:  # the checks of the run folder and of the trainer can give the same warning
            print(f"warning: {printable(message)}", file=sys.stderr)
        shown.add(str(message))

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
