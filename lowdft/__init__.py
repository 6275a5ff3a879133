"""lowdft: Discriminative Fine-Tuning (arXiv 2502.18679) on one ordinary GPU."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["DFTConfig", "DFTTrainer", "__version__"]

_HOMES = {"DFTConfig": "lowdft.config.training", "DFTTrainer": "lowdft.training.trainer"}


def __getattr__(name: str):
    """Imports the heavy names only when they are asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowdft' has no attribute {name!r}")
