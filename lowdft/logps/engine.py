"""Log-probabilities of completions: prompt groups in, one number a scored token out.

Policy and reference go through the same function and the same layout, negatives first and the completion last: in
bfloat16 two layouts of one sequence differ by nats, and DFT exponentiates sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdft.logps.head import Head, token_logps
from lowdft.logps.rows import PADDING, Group, Rows, lay_out, visible


@dataclass(frozen=True)
class CompletionLogps:
    """`per_token_logps_S` in order, and per completion their sum and count (C completions)."""

    per_token_logps_S: Tensor
    logps_C: Tensor
    tokens_C: Tensor


def score(
    model: nn.Module,
    groups: Sequence[Group],
    layout: str = "shared",
    chunk_size: int = 256,
    head_logps: Callable[[Tensor, Head, Tensor], Tensor] | None = None,
) -> CompletionLogps:
    """Scores every completion of every group in one forward pass, in nats.

    Args:
        model: a transformers causal language model, bare or under a peft adapter.
        groups: prompts with their completions; all ids below the vocabulary size.
        layout: "shared" or "padded", see `rows`.
        chunk_size: tokens whose logits exist at once.
        head_logps: what turns (hidden states, head, targets) into log-probabilities; `token_logps` unless given.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = Head.of(causal_lm)
    rows = lay_out(groups, layout).to(head.weight_VD.device)
    output = causal_lm.get_decoder()(
        input_ids=rows.input_ids_RL,
        position_ids=rows.position_ids_RL,
        attention_mask=_attention_mask(rows, causal_lm),
        use_cache=False,
    )
    hidden_SD = output.last_hidden_state.flatten(0, 1)[rows.predictor_S]
    hidden_SD = hidden_SD.to(head.weight_VD.dtype)
    with torch.autocast(hidden_SD.device.type, enabled=False):
        if head_logps is None:
            per_token_S = token_logps(hidden_SD, head, rows.target_S, chunk_size)
        else:
            per_token_S = head_logps(hidden_SD, head, rows.target_S)
    zeros_C = torch.zeros(rows.num_completions, dtype=per_token_S.dtype, device=per_token_S.device)
    logps_C = zeros_C.index_add(0, rows.completion_S, per_token_S)
    return CompletionLogps(per_token_S, logps_C, torch.bincount(rows.completion_S, minlength=rows.num_completions))


def choose_layout(model: nn.Module) -> str:
    """ "shared" if this model scores a small prompt group as it scores its completions one by one, else "padded".

    Two tiny forward passes decide: a model that ignores a 4-D mask or restarted positions gives itself away.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    groups = [Group(draw(5), [draw(4), draw(7), draw(3)])]
    with torch.no_grad():
        alone = score(model, groups, "padded").per_token_logps_S
        try:
            shared = score(model, groups, "shared").per_token_logps_S
        except (TypeError, ValueError, RuntimeError, IndexError):
            return "padded"
    return "shared" if torch.allclose(shared, alone, atol=0.25, rtol=0.02) else "padded"


def _attention_mask(rows: Rows, causal_lm: nn.Module) -> Tensor | dict[str, Tensor]:
    """What this model's attention wants: a 2-D padding mask, a 4-D mask, or one 4-D mask a kind of layer."""
    if rows.layout == "padded":
        return (rows.segments_RL != PADDING).long()
    config = causal_lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    eager, dtype = config._attn_implementation == "eager", causal_lm.dtype

    def mask(within: int | None) -> Tensor:
        seen = visible(rows, within)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min) if eager else seen

    if not kinds:
        return mask(window)
    masks = {"full_attention": lambda: mask(None), "sliding_attention": lambda: mask(window)}
    return {kind: masks[kind]() for kind in kinds}
