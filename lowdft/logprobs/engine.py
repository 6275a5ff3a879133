"""Log-probabilities of completions: prompt groups in, one number per scored token out.

Policy and reference use the same function and the same layout, because in bfloat16 two layouts of one sequence differ
by nats, and DFT exponentiates sums.
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

GRID = 2.0**30  # steps per nat of the log-probabilities that are summed
HALF = (torch.bfloat16, torch.float16)
_LAYERS_IN: ContextVar[torch.dtype | None] = ContextVar("layers_in", default=None)


@contextlib.contextmanager
def layers_in(dtype: torch.dtype | None) -> Iterator[None]:
    """A context in which the layers of a float32 model compute in half precision, by autocast; its head does not."""
    token = _LAYERS_IN.set(dtype)
    try:
        yield
    finally:
        _LAYERS_IN.reset(token)


@dataclass(frozen=True)
class CompletionLogps:
    """`per_token_logps_S` in order, and per completion their sum and count (C completions).

    `computed` counts the tokens of the forward pass, including padding.
    """

    per_token_logps_S: Tensor
    logps_C: Tensor
    tokens_C: Tensor
    computed: int


def score(
    model: nn.Module,
    groups: Sequence[Group],
    layout: str = "packed",
    chunk_size: int | None = None,
    head_logps: Callable[[Tensor, Head, Tensor], Tensor] | None = None,
    token_weight: Callable[[Tensor, Tensor], Tensor] | None = None,
    predicted_share: float = 0.0,
) -> CompletionLogps:
    """Scores every completion of every group in one forward pass, in nats.

    If the model's rotary embedding changes beyond some length (Phi-3's longrope, dynamic NTK), there is one pass for
    each of its settings, so that a score does not depend on the other sequences.

    With gradient checkpointing and the packed layout, the backward pass must also run inside `packed_attention`.

    Args:
        model: a transformers causal language model, with or without peft adapter, whole or sharded (DeepSpeed, FSDP2).
        groups: prompts with their completions; all ids are below the vocabulary size.
        layout: "packed" or "padded", see `rows`.
        chunk_size: how many tokens have their logits in memory at the same time; `head.chunk_for` by default.
        head_logps: maps (hidden states, head, targets) to log-probabilities; `token_logps` by default.
        token_weight: maps the log-probabilities [S] of tokens, and the index [S] of the completion that each belongs
            to, to their weights [S] in `logps_C`; 1 by default.
        predicted_share: how much of the embedding of every completion token is replaced by that of the model's greedy
            prediction; this takes one more forward pass without gradient.
    """
    causal_lm = bare(model)
    settings = (layout, chunk_size, head_logps, token_weight, predicted_share)
    passes = by_rope_setting(causal_lm.config.get_text_config(), groups)
    if len(passes) == 1:
        return _score(model, groups, *settings)
    outs, places = [], []  # a place: (group, completion)
    for numbers in passes:
        outs.append(_score(model, [groups[g].select(chosen) for g, chosen in numbers], *settings))
        places += [(g, k) for g, chosen in numbers for k in chosen]
    order = sorted(range(len(places)), key=places.__getitem__)
    tokens_C = torch.cat([out.tokens_C for out in outs])
    per_token = torch.cat([out.per_token_logps_S for out in outs]).split(tokens_C.tolist())
    return CompletionLogps(
        torch.cat([per_token[c] for c in order]),
        torch.cat([out.logps_C for out in outs])[order],
        tokens_C[order],
        sum(out.computed for out in outs),
    )


def _score(model, groups, layout, chunk_size, head_logps, token_weight, predicted_share) -> CompletionLogps:
    """See `score`; one forward pass."""
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
    weighted_S = per_token_S if token_weight is None else token_weight(per_token_S, rows.completion_S) * per_token_S
    logps_C = _sums(weighted_S, rows.completion_S, len(tokens_C))
    return CompletionLogps(per_token_S, logps_C, tokens_C, rows.input_ids_RL.numel())


def _sums(values_S: Tensor, completion_S: Tensor, completions: int) -> Tensor:
    """Sums [C] of every completion's values, with the same bits for any order of addition.

    Values are rounded to multiples of 2**-30 nats, of which float64 adds up to 4 million nats without rounding.
    """
    exact_S = values_S.double()
    if values_S.dtype != torch.float64:
        exact_S = exact_S + (torch.round(exact_S.detach() * GRID) / GRID - exact_S.detach())
    zeros_C = torch.zeros(completions, dtype=torch.float64, device=values_S.device)
    return zeros_C.index_add(0, completion_S, exact_S).to(values_S.dtype)


def by_rope_setting(config, groups: Sequence[Group]) -> list[list[tuple[int, Sequence[int]]]]:
    """(group, its completions) that may share a forward pass: all, unless the model's rotary embeddings depend on the
    longest sequence of the pass."""
    setting = _rope_setting(config)
    together: dict = {}
    for g, group in enumerate(groups):
        alike: dict = {}
        for k, completion in enumerate(group.completions):
            alike.setdefault(setting(len(group.prompt_ids) + len(completion)), []).append(k)
        for key, chosen in alike.items():
            together.setdefault(key, []).append((g, chosen))
    return list(together.values())


def _rope_setting(config) -> Callable[[int], object]:
    """Maps a sequence's length to a key for the setting of the model's rotary embedding."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    settings = []
    for kind in kinds:
        name = kind.get("rope_type") or ""
        if name == "longrope":
            original = kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
            settings.append(lambda n, original=original: n > original)
        elif "dynamic" in name:
            settings.append(lambda n, original=config.max_position_embeddings: max(n, original))
    return lambda n: tuple(setting(n) for setting in settings)


def bare(model: nn.Module) -> nn.Module:
    """The causal language model itself, without DeepSpeed's and peft's wrappers (adapter layers stay in place)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _predicted(causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, chunk_size: int | None) -> Tensor:
    """[S]: the model's greedy prediction for every scored token."""

    def from_hidden(hidden_SD: Tensor) -> Tensor:
        return greedy_tokens(hidden_SD, Head.of(causal_lm), chunk_size)

    return in_forward(causal_lm.get_output_embeddings(), from_hidden, _predictors(causal_lm, rows, dtype))


def _partly_predicted(
    causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, chunk_size: int | None, share: float
) -> Tensor:
    """Input embeddings [R, L, D]; for scored tokens, (1 - share) E(token) + share E(prediction)."""
    predicted_S, embed = _predicted(causal_lm, rows, dtype, chunk_size), causal_lm.get_input_embeddings()
    given_RLD = embed(rows.input_ids_RL)
    flat = given_RLD.flatten(0, 1)
    change_SD = share * (embed(predicted_S) - flat[rows.place_S])
    return flat.index_add(0, rows.place_S, change_SD.to(flat)).view_as(given_RLD)


def _predictors(causal_lm: nn.Module, rows: Rows, dtype: torch.dtype, embeddings_RLD: Tensor | None = None) -> Tensor:
    """[S, D]: the hidden states that predict the scored tokens, in the head's dtype."""
    half = dtype if dtype in HALF else _LAYERS_IN.get() or torch.float32
    # adapters have float32 weights on a half-precision base; one autocast region per pass, because older versions of
    # torch would reuse copies of weights from a pass without gradient in the next pass
    with torch.autocast(rows.input_ids_RL.device.type, half, enabled=half in HALF):
        return _hidden_states(causal_lm, rows, embeddings_RLD).flatten(0, 1)[rows.predictor_S].to(dtype)


def _hidden_states(causal_lm: nn.Module, rows: Rows, embeddings_RLD: Tensor | None = None) -> Tensor:
    """Hidden states [R, L, D] of the last layer, from the rows' ids or from embeddings instead."""
    inputs = dict(position_ids=rows.position_ids_RL, use_cache=False)
    inputs |= dict(input_ids=rows.input_ids_RL) if embeddings_RLD is None else dict(inputs_embeds=embeddings_RLD)
    decoder = causal_lm.get_decoder()
    if decoder is causal_lm or decoder is causal_lm.get_output_embeddings():  # it names none (Llama 4, ModernBERT)
        if rows.pieces is not None:
            raise ValueError("packed rows need a model that names its decoder")
        return _before_head(causal_lm, inputs)
    if rows.pieces is None:
        return decoder(attention_mask=torch.ones_like(rows.input_ids_RL), **inputs).last_hidden_state
    # an empty 4-D mask: every model passes it through, and any attention other than ours raises an error
    empty = torch.empty((1, 1, 0, 0), device=rows.input_ids_RL.device)
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None)
    mask = {kind: empty for kind in kinds} if kinds else empty
    with packed_attention(causal_lm):
        return decoder(attention_mask=mask, pieces=rows.pieces, **inputs).last_hidden_state


def _before_head(causal_lm: nn.Module, inputs: dict) -> Tensor:
    """The input of the output head in a complete forward pass of the model, [R, L, D]; padded rows only."""
    head, found = causal_lm.get_output_embeddings(), []

    def caught(hidden_RLD: Tensor) -> Tensor:
        found.append(hidden_RLD)
        return hidden_RLD.new_zeros(*hidden_RLD.shape[:-1], 1)

    head.forward = caught
    try:
        type(causal_lm).forward(causal_lm, **inputs)  # its own attribute `forward` may be replaced by `from_rows`
    finally:
        del head.forward
    return found[0]
