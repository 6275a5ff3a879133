"""Work done inside a module's own forward pass: where parameters are sharded, they are whole only there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def in_forward(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` in place of the module's forward, with all its hooks before and after, also those to go back.

    DeepSpeed's ZeRO-3 and FSDP2 keep a part of every parameter on each rank, and gather and release them by such hooks.
    For any other module this is `function(*inputs)`.

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
