"""Atomic, durable files, content hashes, and a lock so that one process at a time writes a folder."""

from lowdft.files.atomic import (
    as_written,
    conceal,
    flush,
    make_folder,
    read_json,
    remove,
    replacing,
    sync_folder,
    write_error,
    write_json,
    write_text,
)
from lowdft.files.digest import checksum_of, contents_of, damage_in, digest_of
from lowdft.files.lock import check_free, locked

__all__ = [
    "as_written",
    "check_free",
    "checksum_of",
    "conceal",
    "contents_of",
    "damage_in",
    "digest_of",
    "flush",
    "locked",
    "make_folder",
    "read_json",
    "remove",
    "replacing",
    "sync_folder",
    "write_error",
    "write_json",
    "write_text",
]
