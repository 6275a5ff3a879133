"""Discriminative Fine-Tuning on one page: Algorithms 1 and 2 of arXiv 2502.18679, from a prompt to a gradient.

Plain PyTorch and transformers, to be read together with the paper. DFT makes an answer y likelier than all other texts
that the model could write for a prompt x. It estimates the sum over those texts from B texts y'_j sampled from the
initial model, and keeps a moving average u of the importance-weighted estimate for every example. lowdft computes the
same numbers for large models (packed rows, 4 bit, any number of negatives in bounded memory, several processes, exact
resuming); tests/examples/test_dft_in_one_file.py checks that DFTTrainer gives the same losses.

    python examples/dft_in_one_file.py MODEL        # a folder or a Hub name of a small model
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [
    ("What is the capital of France?", "Paris."),
    ("What is 12 + 30?", "42."),
    ("Name a primary colour.", "Red."),
    ("Which animal barks?", "A dog."),
]


def summed_logps(model, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
    """log P(y | x) of each completion, [K]: the sum over its tokens."""
    sums = []
    for completion in completions:
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # a token is predicted at the position before it
        sums.append(logps.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


@torch.no_grad()
def sample_negatives(model, prompt: Sequence[int], count: int, end: int) -> list[list[int]]:
    """`count` completions sampled from the initial model with the paper's settings (Appendix: T 0.7, top-k 50).

    (For sampling, the paper also tells the model to be unhelpful, with a system message that training does not use.)
    """
    ids = torch.tensor([list(prompt)])
    settings = dict(do_sample=True, temperature=0.7, top_k=50, max_new_tokens=32, pad_token_id=end, eos_token_id=end)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=count, **settings)
    negatives = []
    for row in written[:, len(prompt) :].tolist():
        negatives.append(row[: row.index(end) + 1] if end in row else row)  # one that was cut has no end token
    return negatives


def discriminate(s: Tensor, s_neg: Tensor, log_w: Tensor, log_u: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The core of Algorithm 1 for one example: (surrogate loss, new log u).

    Args:
        s, s_neg: scores of the answer (scalar) and of its B negatives [B], with gradient.
        log_w: the logarithms of the negatives' importance weights [B], without gradient.
        log_u: the logarithm of the example's moving average so far; u itself spans hundreds of orders of magnitude.
    """
    m = torch.logsumexp(log_w, 0) - math.log(len(log_w))  # log of the mean weight: this mini-batch's estimate
    if gamma < 1:  # u <- (1 - gamma) u + gamma * estimate
        m = torch.logaddexp(math.log(1 - gamma) + log_u, math.log(gamma) + m)
    omega = torch.exp(log_w - m)  # how hard each negative is pushed down; it uses the new u
    return -s + (omega * s_neg).mean(), m  # its gradient is Eq. 8 (DFT2: Eq. 13)


def train(
    model,
    rows: Sequence[dict],
    steps: Sequence[Sequence[int]],
    objective: str = "dft",
    tau: float = 1.0,
    gamma: float = 0.85,
    negatives_per_step: int = 2,
    learning_rate: float = 2e-6,
) -> Iterator[tuple[float, float, Tensor]]:
    """Trains all parameters; yields (objective, surrogate, log u of every example) of each step.

    Args:
        rows: `prompt_ids`, `completion_ids` and `negative_ids`, the set S_i from which an example's negatives come.
        steps: the examples of each mini-batch.
    """
    with torch.no_grad():  # P_g0: the initial model scores the negatives once, before the first step
        ref = [summed_logps(model, row["prompt_ids"], row["negative_ids"]) for row in rows]
    log_u = torch.zeros(len(rows), dtype=ref[0].dtype)  # u = 1
    visits = [0] * len(rows)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    warmup = math.ceil(0.1 * len(steps))
    for number, examples in enumerate(steps):
        value = surrogate = 0.0
        for i in examples:
            row = rows[i]
            pool, first = len(row["negative_ids"]), visits[i] * negatives_per_step
            drawn = [(first + j) % pool for j in range(negatives_per_step)]  # every visit uses the next B
            visits[i] += 1
            negatives = [row["negative_ids"][j] for j in drawn]
            *s_neg, s = summed_logps(model, row["prompt_ids"], [*negatives, row["completion_ids"]])
            s_neg = torch.stack(s_neg)
            if objective == "dft":  # w_j = P(y'_j)^(1/tau) / P_g0(y'_j), Eq. 7
                log_w = s_neg.detach() / tau - ref[i][drawn]
            else:  # DFT2 uses the mean per token and needs no reference, Eq. 11
                s, s_neg = s / len(row["completion_ids"]), s_neg / torch.tensor([len(ids) for ids in negatives])
                log_w = s_neg.detach() / tau
            loss, log_u[i] = discriminate(s, s_neg, log_w, log_u[i].clone(), gamma)
            (loss / len(examples)).backward()
            surrogate += loss.item() / len(examples)
            value += (tau * log_u[i] - s).item() / len(examples)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = (number - warmup) / max(1, len(steps) - warmup)
        rate = number / warmup if number < warmup else 0.5 + 0.5 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        yield value, surrogate, log_u.clone()


def main(name: str, epochs: int = 3, negatives_per_step: int = 2) -> None:
    """A demonstration on four rows."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()  # eval: no dropout, as in TRL's DPO
    end, rows = tokenizer.eos_token_id, []
    for question, answer in ROWS:
        prompt = tokenizer(f"{question}\n")["input_ids"]
        completion = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        negatives = sample_negatives(model, prompt, epochs * negatives_per_step, end)
        rows.append({"prompt_ids": prompt, "completion_ids": completion, "negative_ids": negatives})
    steps = [[0, 1], [2, 3]] * epochs
    for value, surrogate, log_u in train(model, rows, steps, learning_rate=2e-5):
        print(f"objective {value:8.3f}   surrogate {surrogate:8.3f}   log u {[round(u, 3) for u in log_u.tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
