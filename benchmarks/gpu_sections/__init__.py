"""The sections of `benchmarks/gpu.py`, in its order."""

from gpu_sections import exact, speed, whole
from gpu_sections.common import Skip

SECTIONS = (
    exact.causality,
    speed.ceilings,
    exact.nf4_codes,
    exact.attention,
    exact.two_layers,
    exact.neighbours,
    exact.ways_to_a_gradient,
    speed.profile,
    speed.fresh_shapes,
    speed.throughput,
    speed.candidates,
    whole.trainer,
    whole.out_of_memory,
    whole.generation,
    whole.deletion,
)
__all__ = ["SECTIONS", "Skip"]
