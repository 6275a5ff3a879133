"""The check at the start: compares log-probabilities as computed here with the model's own logits on a small group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lowdft.errors import UserError
from lowdft.logprobs.engine import bare, score
from lowdft.logprobs.rows import Group

LENGTH = 12  # tokens per sequence of the small group
ON_DEVICE = ("CUDA", "CUBLAS", "CUDNN", "HIP", "out of memory")  # in error messages that are not the model's fault
CUDA_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


def choose_layout(model: nn.Module, layout: str | None = None) -> str:
    """Returns "packed" if this model scores packed rows correctly, else "padded", which is also checked.

    It runs three small forward passes in eval mode. Scores are correct if they differ from the float32 log-softmax of
    the model's own logits by no more than rounding in its dtype: 5e-4 nats (root mean square) in float32, 0.13 in
    bfloat16, and proportionally more if log-probabilities go beyond 20 nats. Beyond that, another forward pass measures
    how much rounding the input embeddings once more changes the model's own log-probabilities (Gemma-3-270M in
    bfloat16: 0.5 nats on random tokens), and up to three times as much is correct.

    Args:
        model: see `score`.
        layout: check only this one.

    Raises:
        UserError: the scores differ from the model's own, or the model's own are not finite.
    """
    groups, sequences = small_group(bare(model).config.get_text_config().vocab_size)
    with _evaluating(model), torch.no_grad():
        weight = bare(model).get_output_embeddings().weight
        own = partial(own_logps, model, sequences.to(weight.device), groups)
        own_S = own()

        def close(found_S: Tensor) -> bool:
            error = _rms(found_S.double() - own_S)
            if error <= _rounding(own_S, weight.dtype):
                return True
            with _embeddings_rounded_again(model):
                return error <= 3 * _rms(own() - own_S)

        if not own_S.isfinite().all():
            raise UserError(
                f"the model's own log-probabilities are not finite ({own_S.tolist()[:4]}, …): its weights contain NaN "
                "or infinity, or its dtype overflows. Check the weights, or set model.dtype=bfloat16 or float32."
            )
        if layout != "padded":
            with contextlib.suppress(NotPacked):
                if close(_packed(model, groups)):
                    return "packed"
            if layout == "packed":
                raise UserError(
                    "training.layout is packed, but this model does not score packed rows correctly; set "
                    "training.layout=padded"
                )
        found_S = score(model, groups, "padded").per_token_logps_S
        if close(found_S):
            return "padded"
    worst = (found_S.double() - own_S).abs().argmax()
    raise UserError(
        f"{type(bare(model)).__name__}: log-probabilities computed from its hidden states and output head differ "
        f"from those of its own forward pass (a token has {found_S[worst]:.4f} nats, but {own_S[worst]:.4f} by the "
        "model's logits), so this model changes its logits in a way that lowdft does not know, and training it "
        "would be wrong. Use another model, or report this one."
    )


def require_finite(what: str, names: Sequence[str], logps: Sequence[Tensor], advice: str) -> None:
    """Raises UserError unless every row's log-probabilities are finite; names the rows and says what to do.

    Args:
        names: the names of the rows.
        logps: the log-probabilities of each row.
    """
    bad = [name for name, values in zip(names, logps, strict=True) if not values.isfinite().all()]
    if bad:
        shown = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise UserError(f"{what} of {len(bad)} of {len(names)} rows are not finite (example_id {shown}). {advice}")


def small_group(vocabulary: int) -> tuple[list[Group], Tensor]:
    """Groups of random ids, and their sequences [3, LENGTH]; one completion is the beginning of another one."""
    ids = torch.randint(vocabulary, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[1, :5] = ids[0, :5]
    first, second, other = ids.tolist()
    return [Group(first[:5], [first[5:], first[5:9], second[5:]]), Group(other[:3], [other[3:]])], ids


def own_logps(model: nn.Module, sequences: Tensor, groups: list[Group]) -> Tensor:
    """float64 [S]: log-probabilities of the small group's tokens from the model's own forward pass."""
    logits = model(input_ids=sequences, use_cache=False).logits.float().log_softmax(-1).double()
    logps = logits[:, :-1].gather(2, sequences[:, 1:, None])[..., 0]  # [3, LENGTH - 1]: all tokens except the first
    start = [len(group.prompt_ids) - 1 for group in groups]
    prefix = len(groups[0].completions[1])
    return torch.cat([logps[0, start[0] :], logps[0, start[0] :][:prefix], logps[1, start[0] :], logps[2, start[1] :]])


class NotPacked(Exception):
    """The model's code does not support packed rows."""


def _packed(model: nn.Module, groups: list[Group]) -> Tensor:
    try:
        return score(model, groups, "packed").per_token_logps_S
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, CUDA_ERRORS) or any(word in str(error) for word in ON_DEVICE):
            raise
        raise NotPacked from error


def _rounding(own_S: Tensor, dtype: torch.dtype) -> float:
    """The usual error of log-probabilities in `dtype`, in nats (root mean square); see `choose_layout`."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # norms and softmax are float32 in any model
    return 1.5 * eps**0.5 * max(1.0, _rms(own_S) / 20)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@contextlib.contextmanager
def _embeddings_rounded_again(model: nn.Module) -> Iterator[None]:
    """A context in which the input embeddings have a random relative error of up to half a unit in the last place."""

    def disturbed(module, args, output: Tensor) -> Tensor:
        error = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        return output + output * (torch.finfo(output.dtype).eps * error).to(output)

    hook = bare(model).get_input_embeddings().register_forward_hook(disturbed)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
