"""Rows of text: reading, layouts, checks, token ids."""

from __future__ import annotations

from lowdft.data.example import Example
from lowdft.data.load import Loaded, load_examples, overlap

__all__ = ["Example", "Loaded", "load_examples", "overlap"]
