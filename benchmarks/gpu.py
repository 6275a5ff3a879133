"""Checks and measures lowdft on a GPU for the first time, in less than nine minutes.

    python benchmarks/gpu.py                    # a 7B-shaped model of random NF4 weights on the GPU
    python benchmarks/gpu.py --only 3 5 9       # some sections
    python benchmarks/gpu.py --tiny             # a tiny model, also on a CPU: does every section run?

Every section runs in its own `try` with a deadline and prints its line at once. At the end everything is printed as
JSON and written to `benchmarks/results/<device>-gpu-<date>.md`. Sections that need a GPU are skipped on a CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import time
import traceback
from pathlib import Path

import torch
from gpu_sections import SECTIONS, Skip
from gpu_sections.common import Setting

DEADLINE = 75  # seconds of a section
ALL = 530  # seconds of all sections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="sections by number, from 1")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small sizes")
    parser.add_argument("--output", help="where the results go, if not in benchmarks/results")
    options = parser.parse_args()
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.tiny)
    if setting.device.type == "cpu" and not options.tiny:
        parser.error("no GPU is visible; --tiny runs the sections on this CPU")
    start, lines, found = time.perf_counter(), [], {}
    for number, section in enumerate(SECTIONS, 1):
        if options.only and number not in options.only:
            continue
        left = ALL - (time.perf_counter() - start)
        result = run(section, setting, 600 if options.tiny else min(DEADLINE, left))
        found[section.__name__] = result
        lines.append(line_of(number, section, result))
        print(lines[-1], flush=True)
    print(json.dumps(found))
    write(options.output, setting, lines, found)


def run(section, setting: Setting, seconds: float) -> dict:
    """What a section found, with its `verdict` and its seconds; an error or the deadline is a verdict too."""
    start = time.perf_counter()
    if seconds <= 5:
        return {"verdict": "SKIP", "why": "no time left"}
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(int(seconds))
    try:
        result = section(setting)
        passed = result.pop("passed", None)
        result["verdict"] = {True: "PASS", False: "FAIL", None: "MEASURED"}[passed]
    except Skip as reason:
        result = {"verdict": "SKIP", "why": str(reason)}
    except Exception as error:
        traceback.print_exc()
        result = {"verdict": "FAIL", "why": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.alarm(0)
        setting.forget()
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _late(*_) -> None:
    raise TimeoutError("its deadline passed")


def line_of(number: int, section, result: dict) -> str:
    """One line for people."""
    rest = {key: value for key, value in result.items() if key not in ("verdict", "seconds")}
    about = section.__doc__.splitlines()[0].rstrip(".")
    return f"{number:2} {result['verdict']:8} {about}: {json.dumps(rest)} ({result['seconds']} s)"


def write(output: str | None, setting: Setting, lines: list[str], found: dict) -> None:
    """The results file, named by device and date."""
    day, folder = time.strftime("%Y-%m-%d"), Path(__file__).parent / "results"
    name = re.sub(r"[^a-z0-9]+", "-", setting.name.lower()).strip("-")
    path = Path(output) if output else folder / f"{name}{'-tiny' if setting.tiny else ''}-gpu-{day}.md"
    text = f"# {setting.name}, {day}\n\n    python benchmarks/gpu.py{' --tiny' if setting.tiny else ''}\n\n"
    text += "\n".join(f"- {line}" for line in lines) + f"\n\n```json\n{json.dumps(found, indent=1)}\n```\n"
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
