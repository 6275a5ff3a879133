"""A small task with known answers: "Which number is bigger, 9.11 or 9.9?", the opening question of the paper.

The two numbers have different numbers of decimals. Every four rows contain each of four cases once: the longer or the
shorter number is bigger, and it comes first or second. So neither length nor position gives the answer away. In three
of four such groups the two numbers have the same integer part. For any seed, a pair (in either order) is either in
train or in test.
"""

from __future__ import annotations

import hashlib
import random
from urllib.parse import parse_qsl

from lowdft.data.read import Record, cut
from lowdft.errors import UserError

NAME = "toy:bigger-number"
LARGEST = 10_000
SPLITS = ("train", "test")


def read(source: str, split: str | None = None) -> list[Record]:
    """The rows of "toy:bigger-number" or "toy:bigger-number?n=192&seed=0&split=test"; a split in the name has priority.

    With "negatives=1" every row has one negative, the same sentence with the numbers exchanged.

    Raises:
        UserError: another task, an unknown option, or a value out of range.
    """
    name, _, query = source.partition("?")
    if name != NAME:
        raise UserError(f'{cut(source)}: there is no such toy task; the only one is "{NAME}".')
    options = {"n": "192", "seed": "0", "split": split or "train", "negatives": "0"}
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [key for key in given if key not in options]
    if unknown:
        raise UserError(f'{cut(source)}: unknown option "{cut(unknown[0])}"; the options are {", ".join(options)}.')
    options |= given
    for key in ("n", "seed", "negatives"):
        if not options[key].isdecimal():
            raise UserError(f'{cut(source)}: {key} is "{cut(options[key])}"; wanted a whole number.')
    rows = bigger_number(int(options["n"]), int(options["seed"]), options["split"], int(options["negatives"]) > 0)
    return [Record(f"{NAME}:[{i}]", row) for i, row in enumerate(rows)]


def bigger_number(n: int, seed: int = 0, split: str = "train", with_negatives: bool = False) -> list[dict]:
    """`n` different rows {"prompt", "completion", "answer"}; the same arguments give the same rows on any machine.

    `with_negatives` adds "negatives", a list with the sentence that says the opposite.

    Raises:
        UserError: n is not from 1 to 10,000, or split is not "train" or "test".
    """
    if not 1 <= n <= LARGEST:
        raise UserError(f"{NAME}: n is {n}; wanted 1 to {LARGEST}.")
    if split not in SPLITS:
        raise UserError(f'{NAME}: split is "{cut(split)}"; wanted {" or ".join(SPLITS)}.')
    rng = random.Random(f"{seed}-{split}")
    seen: set[frozenset[str]] = set()
    rows: list[tuple[float, dict]] = []
    while len(rows) < n:
        case = len(rows)
        longer_wins, first_wins, same_integer = case % 2 == 0, case // 2 % 2 == 0, case // 4 % 4 != 3
        shorter, longer = _pair(rng, same_integer)
        pair = frozenset((shorter, longer))
        if pair in seen or _split_of(shorter, longer) != split or (float(longer) > float(shorter)) != longer_wins:
            continue
        seen.add(pair)
        big, small = (longer, shorter) if longer_wins else (shorter, longer)
        first, second = (big, small) if first_wins else (small, big)
        row = {
            "prompt": f"Which number is bigger, {first} or {second}?",
            "completion": f"{big} is bigger than {small}.",
            "answer": big,
        }
        if with_negatives:
            row["negatives"] = [f"{small} is bigger than {big}."]
        rows.append((rng.random(), row))
    return [row for _, row in sorted(rows, key=lambda keyed: keyed[0])]


def _pair(rng: random.Random, same_integer: bool) -> tuple[str, str]:
    """Two numbers, the first with fewer decimals. Uses only rng.random(), which is the same in all Python versions."""
    decimals = 1 if rng.random() < 0.75 else 2
    one = 1 + int(rng.random() * 99)
    other = one if same_integer else 1 + (one + int(rng.random() * 98)) % 99
    return f"{one}.{_digits(rng, decimals)}", f"{other}.{_digits(rng, decimals + 1)}"


def _digits(rng: random.Random, count: int) -> str:
    """Decimals that do not end in 0, so that different decimals are different numbers."""
    *front, last = (rng.random() for _ in range(count))
    return "".join(str(int(value * 10)) for value in front) + str(1 + int(last * 9))


def _split_of(shorter: str, longer: str) -> str:
    """Whether a pair is a test pair; one in five is."""
    return "test" if hashlib.sha256(f"{shorter}|{longer}".encode()).digest()[0] % 5 == 0 else "train"
