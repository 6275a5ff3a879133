"""Runs a function inside a module's forward pass, because sharded parameters are complete only there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def in_forward(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Calls `function(*inputs)` instead of the module's forward, with all of the module's forward and backward hooks.

    DeepSpeed's ZeRO-3 and FSDP2 keep a part of every parameter on each rank, and use such hooks to gather and release
    them. For any other module this is just `function(*inputs)`.

    Args:
        module: the module, or a wrapper that calls its `module` (DeepSpeed's engine).
    """
    called = getattr(module, "module", module)
    own = called.__dict__.get("forward")
    called.forward = function
    try:
        return module(*inputs)
    finally:
        if own is None:
            del called.forward
        else:
            called.forward = own
