"""What leaving out negligible negatives saves and costs: every step of a real training is computed with and without.

    lowdft generate RECIPE && lowdft score RECIPE       # once
    python benchmarks/skipping.py RECIPE [section.key=value …]

The step with `skip_negligible` is the one that trains. Printed a step: the share of negatives left out, the relative
error of the gradient against nothing left out, and the seconds of both (scoring first is forced here; in training it
is done when it is expected to save time).
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from lowdft import DFTTrainer, models
from lowdft.config.recipe import load_recipe
from lowdft.pipeline.context import Run


class Compared(DFTTrainer):
    """Computes each micro-batch twice."""

    def _accumulate(self, model, batch):
        bounded, state = self._passes, dataclasses.asdict(self._passes)
        self._passes = dataclasses.replace(bounded, skip_negligible=0.0)
        start = time.perf_counter()
        super()._accumulate(model, batch)
        exact_seconds = time.perf_counter() - start
        exact = self._gradient(model)
        self._step.begin_again(self._log_u, self._metrics["train"], model)
        bounded._in_two = lambda groups: True  # also where it saves no time: the error is of interest everywhere
        self._passes = bounded
        vars(bounded).update({name: state[name] for name in ("budget", "expected_skips")})
        before = self._metrics["train"]._sums.get("weights/skipped", 0.0)
        start = time.perf_counter()
        loss = super()._accumulate(model, batch)
        seconds = time.perf_counter() - start
        found = self._gradient(model)
        error = ((found - exact).norm() / exact.norm()).item()
        skipped = (self._metrics["train"]._sums["weights/skipped"] - before) / len(batch)
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0).item()
        print(
            f"| {self.state.global_step} | {skipped:.2f} | {error:.1e} | {cosine:.6f} | {seconds:.2f} "
            f"| {exact_seconds:.2f} |",
            flush=True,
        )
        return loss

    def _gradient(self, model) -> torch.Tensor:
        return torch.cat([p.grad.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rows", type=int, help="training rows to use")
    options = parser.parse_args()
    run = Run(load_recipe(options.recipe, options.overrides))
    rows = run.encoded("train")
    if run.objective.uses_any_reference:
        rows = run.with_reference(rows)
    model = models.add_adapter(run.base(), run.recipe.adapter, run.args.seed)
    args = run.args
    args.gradient_accumulation_steps, args.save_strategy, args.disable_tqdm = 1, "no", True
    args.logging_strategy = "no"
    print(f"{args.objective}, learning rate {args.learning_rate:g}, bound {args.skip_negligible:g}")
    print(
        "| step | left out | relative error | cosine | s, left out | s, nothing left out |\n|---|---|---|---|---|---|"
    )
    Compared(model, args, rows[: options.rows], processing_class=run.tokenizer).train()


if __name__ == "__main__":
    main()
