"""Log-probabilities of completions: prompt groups in, one number a scored token out.

Policy and reference go through the same function and the same layout: in bfloat16 two layouts of one sequence differ by
nats, and DFT exponentiates sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdft.logprobs.attention import packed_attention
from lowdft.logprobs.forward_redirect import in_forward
from lowdft.logprobs.head import Head, greedy_tokens, token_logps
from lowdft.logprobs.rows import Group, Rows, lay_out

HALF = (torch.bfloat16, torch.float16)
_LAYERS_IN: ContextVar[torch.dtype | None] = ContextVar("layers_in", default=None)


@contextlib.contextmanager
def layers_in(dtype: torch.dtype | None) -> Iterator[None]:
    """While this lasts the layers of a float32 model compute in a half precision, by autocast; its head does not."""
    token = _LAYERS_IN.set(dtype)
    try:
        yield
    finally:
        _LAYERS_IN.reset(token)


@dataclass(frozen=True)
class CompletionLogps:
    """`per_token_logps_S` in order, and per completion their sum and count (C completions).

    `computed` counts the tokens of the forward pass, with its padding.
    """

    per_token_logps_S: Tensor
    logps_C: Tensor
    tokens_C: Tensor
    computed: int


def score(
    model: nn.Module,
    groups: Sequence[Group],
    layout: str = "packed",
    chunk_size: int = 256,
    head_logps: Callable[[Tensor, Head, Tensor], Tensor] | None = None,
    token_weight: Callable[[Tensor, Tensor], Tensor] | None = None,
    predicted_share: float = 0.0,
) -> CompletionLogps:
    """Scores every completion of every group in one forward pass, in nats.

    With gradient checkpointing and the packed layout, the backward pass must run inside `packed_attention` too.

    Args:
        model: a transformers causal language model, bare or under a peft adapter, whole or sharded (DeepSpeed, FSDP2).
        groups: prompts with their completions; all ids below the vocabulary size.
        layout: "packed" or "padded", see `rows`.
        chunk_size: tokens whose logits exist at once.
        head_logps: what turns (hidden states, head, targets) into log-probabilities; `token_logps` unless given.
        token_weight: weights [S] of the tokens in `logps_C`, from their log-probabilities [S] and the completion [S]
            that each belongs to; 1 unless given.
        predicted_share: share of the model's own greedy prediction of a token in the embedding of every completion
            token, which takes one more forward pass, without gradient.
    """
    causal_lm = bare(model)
    weight_VD = Head.of(causal_lm).weight_VD
    device, dtype = weight_VD.device, weight_VD.dtype
    rows = lay_out(groups, layout).to(device)

    def from_hidden(hidden_SD: Tensor) -> Tensor:
        head = Head.of(causal_lm)
        if head_logps is None:
            return token_logps(hidden_SD, head, rows.target_S, chunk_size)
        return head_logps(hidden_SD, head, rows.target_S)

    def from_rows() -> Tensor:
        mixed_RLD = _partly_predicted(causal_lm, rows, dtype, chunk_size, predicted_share) if predicted_share else None
        hidden_SD = _predictors(causal_lm, rows, dtype, mixed_RLD)
        with torch.autocast(device.type, enabled=False):
            return in_forward(causal_lm.get_output_embeddings(), from_hidden, hidden_SD)

    per_token_S = in_forward(model, from_rows)
    tokens_C = torch.tensor([n for group in groups for n in group.scored_tokens], device=per_token_S.device)
    zeros_C = torch.zeros(len(tokens_C), dtype=per_token_S.dtype, device=per_token_S.device)
    weighted_S = per_token_S if token_weight is None else token_weight(per_token_S, rows.completion_S) * per_token_S
    logps_C = zeros_C.index_add(0, rows.completion_S, weighted_S)
    return CompletionLogps(per_token_S, logps_C, tokens_C, rows.input_ids_RL.numel())


def bare(model: nn.Module) -> nn.Module:
    """The causal language model itself, without DeepSpeed's and peft's wrappers (adapter layers stay in place)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def choose_layout(model: nn.Module) -> str:
    """ "packed" if this model scores a small packed group as it scores its completions one by one, else "padded".

    Two tiny forward passes decide: a model whose attention does not follow the packed row gives itself away.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = bare(model).config.get_text_config().vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    groups = [Group(draw(5), [draw(4), draw(7), draw(3)]), Group(draw(2), [draw(6)])]
    with torch.no_grad():
        alone = score(model, groups, "padded").per_token_logps_S
        try:
            packed = score(model, groups, "packed").per_token_logps_S
        except (TypeError, ValueError, RuntimeError, IndexError):
            return "padded"
    return "packed" if torch.allclose(packed, alone, atol=0.25, rtol=0.02) else "padded"


@torch.no_grad()
def _predicted(causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, chunk_size: int) -> Tensor:
    """[S]: what the model itself would have written in the place of every scored token."""

    def from_hidden(hidden_SD: Tensor) -> Tensor:
        return greedy_tokens(hidden_SD, Head.of(causal_lm), chunk_size)

    return in_forward(causal_lm.get_output_embeddings(), from_hidden, _predictors(causal_lm, rows, dtype))


def _partly_predicted(causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, chunk_size: int, share: float) -> Tensor:
    """Input embeddings [R, L, D], those of scored tokens (1 - share) E(token) + share E(prediction)."""
    predicted_S, embed = _predicted(causal_lm, rows, dtype, chunk_size), causal_lm.get_input_embeddings()
    given_RLD = embed(rows.input_ids_RL)
    flat = given_RLD.flatten(0, 1)
    change_SD = share * (embed(predicted_S) - flat[rows.place_S])
    return flat.index_add(0, rows.place_S, change_SD.to(flat)).view_as(given_RLD)


def _predictors(causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, embeddings_RLD: Tensor | None = None) -> Tensor:
    """[S, D]: the hidden states that predict the scored tokens, in the head's dtype."""
    half = dtype if dtype in HALF else _LAYERS_IN.get() or torch.float32
    # adapters keep float32 weights beside a half base; one region a pass, because older versions of torch would take
    # autocast's copies of them from a pass without gradient into the next
    with torch.autocast(rows.input_ids_RL.device.type, half, enabled=half in HALF):
        return _hidden_states(causal_lm, rows, embeddings_RLD).flatten(0, 1)[rows.predictor_S].to(dtype)


def _hidden_states(causal_lm: nn.Module, rows: Rows, embeddings_RLD: Tensor | None = None) -> Tensor:
    """[R, L, D] of the last layer, from the rows' ids or from embeddings in their place."""
    inputs = dict(position_ids=rows.position_ids_RL, use_cache=False)
    inputs |= dict(input_ids=rows.input_ids_RL) if embeddings_RLD is None else dict(inputs_embeds=embeddings_RLD)
    decoder = causal_lm.get_decoder()
    if rows.parts is None:
        return decoder(attention_mask=torch.ones_like(rows.input_ids_RL), **inputs).last_hidden_state
    # an empty 4-D mask: passed through as it is by every model, and an error for any attention but ours
    empty = torch.empty((1, 1, 0, 0), device=rows.input_ids_RL.device)
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None)
    mask = {kind: empty for kind in kinds} if kinds else empty
    with packed_attention(causal_lm):
        return decoder(attention_mask=mask, parts=rows.parts, **inputs).last_hidden_state
