"""Predicts whether negatives will help on some rows, from a few steps of SFT, samples and one gradient of each method.

The gradient test: F is the mean over held-out rows of log sigmoid((s(y) - max_j s(y'_j)) / tau), with s the summed
log-probability. It rises as the completion gets ahead of the strongest wrong answer. A method's next step from here is
in Adam's direction

    d = mean_b(g_b) / sqrt(mean_b(g_b^2))        g_b: its gradient on one of several blocks of training rows

which, as in Adam, does not depend on the scale of the loss. To first order, F gains -<grad F, d> per unit of learning
rate. The prediction is the difference of this gain from SFT's; its standard error is a jackknife that leaves out one
block of training rows and one of held-out rows at a time. (Derived for this project; benchmarks/probe.py compares it
with studies.)

Shape suffixes: P trainable parameters, M prompts, K completions of a prompt (its negatives first).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lowdft import objectives
from lowdft.data.batch import group_of
from lowdft.models.reference import reference_on
from lowdft.objectives import Scores
from lowdft.training.token_budget import Passes

TAU = 1.0  # nats
BLOCKS = 8
NOTHING_TO_WIN, TEACH_FIRST, FAR = 0.05, 0.90, 5.0  # two shares of rows with a likelier wrong answer; nats behind


@dataclass(frozen=True)
class Method:
    """An objective with its hyper-parameters, and how many negatives per row it uses in a step."""

    name: str
    hyperparameters: dict
    negatives: int


@dataclass(frozen=True)
class Gain:
    """The first-order gain of F per unit of learning rate, and its difference from SFT's with a standard error."""

    gain: float
    ahead: float
    error: float


def groups_of(rows: Sequence[dict], count: int) -> list:
    """Each row's group with `count` of its negatives, reusing them in turn if it has fewer."""
    taken = [[row["negative_ids"][k % len(row["negative_ids"])] for k in range(count)] for row in rows]
    return [group_of(row, negatives) for row, negatives in zip(rows, taken, strict=True)]


def summed_logps(model: nn.Module, rows: Sequence[dict], count: int, passes: Passes) -> Tensor:
    """Summed log-probabilities [rows, count + 1] under the current model, without gradient; the completion is last."""
    model.eval()
    return torch.cat([passes.score(model, groups_of(block, count)).double().cpu() for block in _parts(rows, 16)])


def accumulate(
    model: nn.Module, rows: Sequence[dict], method: Method, passes: Passes, ref_MK: Tensor | None = None
) -> None:
    """Adds the gradient of the method's mean loss over these rows to the parameters' gradients.

    Args:
        ref_MK: the reference's log-probabilities of the same completions, if the method needs them.
    """
    groups, objective = groups_of(rows, method.negatives), objectives.get(method.name)
    tokens_MK = torch.tensor([group.scored_tokens for group in groups])
    per_prompt = tokens_MK[:, -1].float().mean().item()

    def surrogate(numbers: Sequence[int], logps_MK: Tensor) -> Tensor:
        chosen = list(numbers)
        tokens = tokens_MK[chosen].to(logps_MK.device)
        scores = Scores(logps_MK[:, -1], tokens[:, -1], tokens_per_prompt=per_prompt)
        if objective.uses_negatives:
            scores.policy_negative_logps_MB, scores.negative_tokens_MB = logps_MK[:, :-1], tokens[:, :-1]
        if objective.uses_log_u:
            scores.log_u_M = torch.zeros(len(chosen), device=logps_MK.device, dtype=logps_MK.dtype)
        if objective.uses_any_reference:
            ref = ref_MK[chosen].to(logps_MK)
            scores.ref_negative_logps_MB, scores.ref_logps_M = ref[:, : logps_MK.shape[1] - 1], ref[:, -1]
        return objective.compute(scores, **method.hyperparameters).surrogate_M.sum() / len(groups)

    passes.backpropagate(model, groups, surrogate, lambda loss, last: loss.backward())


def teach(model: nn.Module, rows: Sequence[dict], steps: int, batch: int, learning_rate: float, passes: Passes) -> None:
    """Trains a few steps of SFT with AdamW, using the rows in order."""
    sft = Method("sft", {}, 0)
    optimizer = torch.optim.AdamW(_trainable(model), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        part = [rows[(step * batch + i) % len(rows)] for i in range(min(batch, len(rows)))]
        accumulate(model, part, sft, passes)
        optimizer.step()
        optimizer.zero_grad()


def gradient_test(
    model: nn.Module,
    train: Sequence[dict],
    heldout: Sequence[dict],
    methods: Sequence[Method],
    count: int,
    passes: Passes,
    ref_MK: Tensor | None = None,
) -> dict[str, Gain]:
    """The gain of SFT (first) and of every method, by name.

    Args:
        count: how many negatives of a held-out row F uses.
        ref_MK: the reference's scores [training rows, most negatives of a method + 1]; the completion is last.
    """
    model.eval()
    blocks = _blocks(train)
    aims = [_gradient(model, lambda rows=rows: _aim(model, rows, count, passes)) for rows in _blocks(heldout)]
    gains = {}
    for method in methods:
        refs = [None] * len(blocks) if ref_MK is None else _of_method(ref_MK, method).split([len(b) for b in blocks])
        steps = [_step(model, *pair, method, passes) for pair in zip(blocks, refs, strict=True)]
        gains[method.name] = _gains(aims, steps)
    sft = gains[methods[0].name]
    return {name: _compared(own, sft) for name, own in gains.items()}


def _step(model: nn.Module, rows: Sequence[dict], ref_MK: Tensor | None, method: Method, passes: Passes) -> Tensor:
    return _gradient(model, lambda: accumulate(model, rows, method, passes, ref_MK))


def _of_method(ref_MK: Tensor, method: Method) -> Tensor:
    return torch.cat([ref_MK[:, : method.negatives], ref_MK[:, -1:]], dim=1)


def _aim(model: nn.Module, rows: Sequence[dict], count: int, passes: Passes) -> None:
    """Adds the gradient of -F on these rows."""
    groups = groups_of(rows, count)

    def surrogate(numbers: Sequence[int], logps_MK: Tensor) -> Tensor:
        ahead_M = logps_MK[:, -1] - logps_MK[:, :-1].max(1).values
        return -logsigmoid(ahead_M / TAU).sum() / len(groups)

    passes.backpropagate(model, groups, surrogate, lambda loss, last: loss.backward())


def _gains(aims: Sequence[Tensor], of_blocks: Sequence[Tensor]) -> list[float]:
    """The gain with all blocks, then with one training block and one held-out block left out at a time."""
    n, sum_P, squares_P = len(of_blocks), sum(of_blocks), sum(g.square() for g in of_blocks)
    aim_P = sum(aims)
    found = [_gain(aim_P / len(aims), sum_P / n, squares_P / n)]
    for i in range(min(n, len(aims))):
        rest_P = (aim_P - aims[i]) / (len(aims) - 1)
        found.append(_gain(rest_P, (sum_P - of_blocks[i]) / (n - 1), (squares_P - of_blocks[i].square()) / (n - 1)))
    return found


def _gain(aim_P: Tensor, mean_P: Tensor, square_P: Tensor) -> float:
    """The gain of F for a step down a method's gradient; both are gradients of something to be made smaller."""
    step_P = mean_P / (square_P.clamp_min(0).sqrt() + 1e-8 * square_P.max().sqrt() + 1e-30)
    return float(aim_P.double() @ step_P.double())


def _compared(own: Sequence[float], sft: Sequence[float]) -> Gain:
    ahead, *left_out = (a - b for a, b in zip(own, sft, strict=True))
    n, mean = len(left_out), sum(left_out) / len(left_out)
    return Gain(own[0], ahead, math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out)))


def _gradient(model: nn.Module, add: Callable[[], None]) -> Tensor:
    """[P] on the CPU: the gradient that `add` gives the trainable parameters, starting from no gradient."""
    parameters = _trainable(model)
    for parameter in parameters:
        parameter.grad = None
    add()
    flat = [
        p.grad.detach().flatten().float().cpu() if p.grad is not None else torch.zeros(p.numel()) for p in parameters
    ]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(flat)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _blocks(rows: Sequence[dict]) -> list[Sequence[dict]]:
    return list(_parts(rows, max(1, math.ceil(len(rows) / BLOCKS))))


def _parts(rows: Sequence[dict], size: int) -> Iterable[Sequence[dict]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def reference_logps(model: nn.Module, rows: Sequence[dict], count: int, passes: Passes) -> Tensor:
    """`summed_logps` of the model as its reference."""
    with reference_on(model):
        return summed_logps(model, rows, count, passes)


def outscored(logps_MK: Tensor) -> tuple[float, float]:
    """The share of rows in which a negative is likelier than the completion, and its mean lead there (nats)."""
    lead_M = logps_MK[:, :-1].max(1).values - logps_MK[:, -1]
    behind = lead_M[lead_M > 0]
    return len(behind) / len(lead_M), float(behind.mean()) if len(behind) else 0.0


def half_weight(gamma: float, log_u_init: float = 0.0) -> float:
    """d*: how many nats a negative can drop before its weight in DFT, on a first visit with B = 1, is halved.

    omega = 1 / (gamma + (1 - gamma) exp(log_u_init + d)) has half of its largest value at
    d* = log(gamma / (1 - gamma)) - log_u_init; infinite for gamma = 1.
    """
    return math.inf if gamma == 1 else math.log(gamma / (1 - gamma)) - log_u_init


def coverage(texts: Sequence[Sequence[str]]) -> float:
    """Good-Turing: the share of a prompt's wrong answers, by probability, that its samples have already seen.

    1 - (texts that occur once in a prompt's samples) / (samples), over all prompts.
    """
    once = sum(sum(number == 1 for number in Counter(own).values()) for own in texts)
    return 1 - once / max(1, sum(map(len, texts)))


def recommend(found: dict, gains: dict[str, Gain]) -> tuple[str, str]:
    """The recommended objective, and the reason in one sentence.

    Args:
        found: `outscored_after` (share), `lead_after`, `drift` and `half_weight` (nats).
        gains: the gains of "sft" and of the other methods.
    """
    share, lead = found["outscored_after"], found["lead_after"]
    if share < NOTHING_TO_WIN:
        return "sft", (
            f"after a little SFT, only {100 * share:.0f}% of held-out rows have a wrong answer that is likelier than "
            "the completion, so there is nothing to gain"
        )
    if share > TEACH_FIRST and lead > FAR:
        return "sft", (
            f"{100 * share:.0f}% of held-out rows have a likelier wrong answer, by {lead:.1f} nats: first teach the "
            "task with SFT, then probe again with that adapter as training.reference_model"
        )
    others = {name: gain for name, gain in gains.items() if name != "sft"}
    if found["drift"] > found["half_weight"]:
        others = {name: gain for name, gain in others.items() if not objectives.get(name).uses_log_u} or others
    name = max(others, key=lambda one: others[one].ahead)
    best = others[name]
    if best.ahead > best.error and gains["sft"].gain > 0:
        return name, f"its next step gains {best.ahead / gains['sft'].gain:+.0%} compared with SFT's"
    if best.ahead > best.error:
        return name, f"its next step {'gains' if best.gain > 0 else 'loses less'} on held-out rows, while SFT's loses"
    if best.ahead < -best.error:
        return "sft", "no step with negatives gains as much on held-out rows as SFT's"
    return "sft", "on held-out rows, negatives gain no more than SFT within the error, and they cost more"
