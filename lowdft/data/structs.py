"""Objects from Arrow tables (parquet files, the Hub, `datasets`), with the fields that were written."""

from __future__ import annotations


def own_fields(value: object) -> object:
    """A value without the null fields of its objects, at any depth; lists keep their nulls.

    Arrow gives all objects of a column the same fields: of two calls with the arguments {"city": "Paris"} and {"x": 1},
    each gets the other's argument, as null.
    """
    if isinstance(value, dict):
        return {name: own_fields(field) for name, field in value.items() if field is not None}
    return [own_fields(one) for one in value] if isinstance(value, list) else value


def own_columns(row: dict) -> dict:
    """A row whose columns hold what was written; its own null columns stay."""
    return {name: own_fields(value) for name, value in row.items()}
