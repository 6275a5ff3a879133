"""Loads the rows of a run from a file, the Hub or the toy task: reads them, finds their layout and checks them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass

from lowdft.data import toy
from lowdft.data.checks import check_columns, check_row, check_table, place
from lowdft.data.example import Example, Row, canonical_json, normal, to_example
from lowdft.data.formats import to_row
from lowdft.data.layouts import CONVERSATIONS, MAPPABLE, BadRow, unused_columns
from lowdft.data.read import REMOVE, Finding, Record, cut, read_records
from lowdft.errors import InvalidRows, UserError
from lowdft.text import nearest

SHOWN = 20  # bad rows reported in full


@dataclass
class Loaded:
    """Checked rows, with notes and warnings about them. `layout` is the most common one."""

    examples: list[Example]
    layout: str
    notes: list[str]
    warnings: list[str]
    skipped: int
    fingerprint: str


def load_examples(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    prompt_style: str = "chat",
    system_prompt: str | None = None,
    prompt_template: str | None = None,
    skip_invalid: bool = False,
) -> Loaded:
    """Reads and checks all rows of `source`.

    Args:
        source: a file, "owner/name" on the Hub, or "toy:bigger-number" (optionally with "?n=192&seed=0&split=test").
        split, revision: of a Hub data set; `split` also for the toy task. Ignored for a file.
        columns: lowdft's name -> the user's column, e.g. {"prompt": "question_text", "negatives": "bad"}.
        prompt_style: "chat" turns text into messages; "direct" keeps text.
        system_prompt: added to messages without a system message.
        prompt_template: text in which a string prompt replaces {prompt}; not for rows of messages.
        skip_invalid: leave out invalid rows with a warning instead of raising.

    Raises:
        InvalidRows: rows are invalid (all are reported together); with `skip_invalid`, only if all of them are.
        UserError: the source cannot be read.
    """
    if prompt_style not in ("chat", "direct"):
        raise UserError(f'data.prompt_style is "{cut(prompt_style)}"; "chat" or "direct" is wanted.')
    name = os.fspath(source)
    records = toy.read(name, split) if name.startswith("toy:") else read_records(name, split, revision)
    columns = dict(columns or {})
    _check_map(columns, records, name)
    rows, found = _rows(records, columns)
    bad = {finding.where for finding in found if not finding.warning}
    found += _mixed_layouts(rows, records[0].where)
    rows = [row for row in rows if row.where not in bad]
    found += check_table(rows)
    errors = [finding for finding in found if not finding.warning]
    bad = {finding.where for finding in errors}
    rows = [row for row in rows if row.where not in bad]
    if errors and (not skip_invalid or not rows):
        told = [f"{name}: warning: {line}" for line in summaries([f for f in found if f.where not in bad])]
        text = "\n".join([_refusal(errors, len(bad), len(records), name, skip_invalid), *told])
        raise InvalidRows(text, _examples(rows, prompt_style))
    if prompt_template is not None:
        _check_template(rows)
    examples = _examples(rows, prompt_style, system_prompt, prompt_template)
    warnings = [_skipped(errors, len(bad), len(records))] if bad else []
    warnings += summaries([finding for finding in found if finding.where not in bad])
    layout = Counter(row.layout for row in rows).most_common(1)[0][0]
    return Loaded(
        examples,
        layout,
        _notes(rows, layout, records, tuple(columns.values())),
        warnings,
        len(bad),
        fingerprint(examples),
    )


def fingerprint(examples: list[Example]) -> str:
    """SHA-256 (hex) of everything in the rows, in order."""
    digest = hashlib.sha256()
    for e in examples:
        parts = [e.example_id, e.prompt, e.completion, e.negatives, e.tools, e.answer]
        parts += [] if e.aligned_logps is None else [e.aligned_logps]
        digest.update(canonical_json(parts).encode() + b"\n")
    return digest.hexdigest()


def _check_map(columns: dict[str, str], records: list[Record], name: str) -> None:
    there = list(dict.fromkeys(str(column) for record in records for column in record.columns))
    for ours, theirs in columns.items():
        if ours not in MAPPABLE:
            near = nearest(ours, MAPPABLE)
            hint = f'did you mean "{near}"? ' if near else ""
            raise UserError(f'data.columns: "{cut(ours)}" is not a known name; {hint}known are {", ".join(MAPPABLE)}.')
        if there and theirs not in there:
            near = nearest(theirs, there)
            hint = f' Did you mean "{near}"?' if near else ""
            raise UserError(
                f'{name}: no row has the column "{cut(theirs)}", which data.columns uses as {ours}; '
                f"the columns are {cut(', '.join(there), 200)}.{hint}"
            )


def _rows(records: list[Record], columns: dict[str, str]) -> tuple[list[Row], list[Finding]]:
    """The rows that have a layout, and all findings for single records."""
    rows: list[Row] = []
    found: list[Finding] = []
    mapped = tuple(columns.values())
    for record in records:
        found += record.findings
        if any(not finding.warning for finding in record.findings):
            continue
        try:
            row = to_row(record, columns, expected=rows[0].layout if rows else None)
        except BadRow as err:
            found.append(Finding(record.where, err.field, err.text))
        else:
            rows.append(row)
            found += [*check_row(row), *check_columns(record, row.layout, mapped)]
    return rows, found


def _mixed_layouts(rows: list[Row], first: str) -> list[Finding]:
    """A warning for each row whose layout differs from the first row's (or for all, if the first row has none)."""
    if len({row.layout for row in rows}) < 2:
        return []
    main = rows[0].layout if rows[0].where == first else None
    kind = "a different layout than the first row of the file"
    return [Finding(row.where, "", f"layout {row.layout}", kind) for row in rows if row.layout != main]


def _refusal(errors: list[Finding], bad: int, total: int, name: str, skip_invalid: bool) -> str:
    if len({(error.field, error.text) for error in errors}) == 1 and bad > SHOWN:
        return f"{errors[0]} ({bad} of {total} rows have this error.)"
    wheres = list(dict.fromkeys(error.where for error in errors))[:SHOWN]
    lines = [str(error) for error in errors if error.where in wheres]
    if skip_invalid:
        lines.append(f"{name}: all {total} rows are invalid, so none are left.")
    elif bad > SHOWN:
        lines.append(f"… and {bad - SHOWN} more bad rows ({bad} of {total} in {name}).")
    return "\n".join(lines)


def _skipped(errors: list[Finding], bad: int, total: int) -> str:
    first = {error.where: error for error in reversed(errors)}
    ordered = list(dict.fromkeys(error.where for error in errors))
    reasons = [f"{place(w)}: {first[w].field} {first[w].text}".replace(":  ", ": ") for w in ordered[:3]]
    told = " ".join(reasons).replace(f" {REMOVE}", "").replace(", or pass --skip-invalid", "")
    return f"{bad} of {total} rows skipped as invalid: {places(ordered)} ({told})"


def _check_template(rows: list[Row]) -> None:
    messages = [row for row in rows if not row.is_text]
    if messages:
        raise UserError(
            f"{messages[0].where}: {messages[0].trained_turn} is a message, but data.prompt_template is for string "
            f"prompts ({len(messages)} of {len(rows)} rows have messages). Remove the key, or write these rows as text."
        )


def _examples(rows: list[Row], *how: str | None) -> list[Example]:
    """The examples with unique ids: repeated contents get "-2", "-3" and so on."""
    seen: Counter[str] = Counter()
    examples = []
    for row in rows:
        example = to_example(row, *how)
        if row.given_id is None:
            seen[example.example_id] += 1
            if seen[example.example_id] > 1:
                example.example_id += f"-{seen[example.example_id]}"
        examples.append(example)
    return examples


def _notes(rows: list[Row], layout: str, records: list[Record], mapped: tuple[str, ...]) -> list[str]:
    trained = " (the last assistant turn of each row is trained on)" if layout in CONVERSATIONS else ""
    notes = [f"layout: {layout}{trained}"]
    used = list(dict.fromkeys(column for row in rows for column in row.negative_columns))
    if used:
        with_some = [row.where for row in rows if row.negatives]
        what = f"{used[0]} is used as a negative" if len(used) == 1 else f"{', '.join(used)} are used as negatives"
        notes.append(what + (f" (rows: {len(with_some)}, first {place(with_some[0])})" if with_some else " (no rows)"))
    names = dict.fromkeys(name for record in records for name in record.columns)
    if unused := unused_columns(tuple(names), layout, mapped):
        notes.append(f"columns that are not used: {cut(', '.join(unused), 200)}")
    return notes


def places(wheres: list[str], limit: int = 5) -> str:
    """A short list of places: "lines 2, 3, 9 and 12 more"."""
    ats = [place(where).split(" ", 1) for where in dict.fromkeys(wheres)]
    more = f" and {len(ats) - limit} more" if len(ats) > limit else ""
    return f"{ats[0][0]}{'s' if len(ats) > 1 else ''} {', '.join(at for _, at in ats[:limit])}{more}"


def summaries(findings: list[Finding]) -> list[str]:
    """One line per kind of warning: how many rows, the first places, and the first warning in full."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.warning, []).append(finding)
    lines = []
    for kind, of_kind in kinds.items():
        wheres = list(dict.fromkeys(f.where for f in of_kind))
        first = f"{of_kind[0].field} {of_kind[0].text}".strip()
        rows = f"{len(wheres)} row{'s' if len(wheres) > 1 else ''}"
        lines.append(f"{rows} with {kind}: {places(wheres)} ({place(wheres[0])}: {first})")
    return lines


def overlap(train: list[Example], heldout: list[Example]) -> list[str]:
    """A list with a warning if held-out prompts are also in the training rows, else an empty list.

    Prompts are compared as text without system messages, with white space and Unicode form normalised.
    """
    trained: dict[tuple, Example] = {}
    for example in train:
        trained.setdefault(_asked(example.prompt), example)
    both = [(trained[key], example) for example in heldout if (key := _asked(example.prompt)) in trained]
    if not both:
        return []
    in_train, in_heldout = ([pair[i].source for pair in both] for i in (0, 1))
    prompts = "1 held-out prompt is" if len(both) == 1 else f"{len(both)} held-out prompts are"
    return [f"{prompts} also trained on ({_file(in_train)} {places(in_train)}; held out: {_file(in_heldout)} "
            f"{places(in_heldout)}), so the evaluation looks too good. Remove them from one of the two."]  # fmt: skip


def _asked(prompt: str | list[dict]) -> tuple:
    if isinstance(prompt, str):
        return (normal(prompt),)
    return tuple(normal(m["content"] or "") for m in prompt if m["role"] != "system")


def _file(wheres: list[str]) -> str:
    return wheres[0].rpartition(":")[0]
