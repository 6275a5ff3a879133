"""Every change of a file's content is found."""

from __future__ import annotations

import os

import pytest

from lowdft.files import contents_of, damage_in, digest, digest_of


@pytest.mark.parametrize("size", [1, 1000, 3 * 64 + 5])
def test_every_flipped_bit_is_found(size, tmp_path, monkeypatch):
    """Of a small file and of one that is hashed in pieces."""
    monkeypatch.setattr(digest, "PIECE", 64)
    path = tmp_path / "a"
    path.write_bytes(content := os.urandom(size))
    noted = contents_of(path)
    assert damage_in(path, noted) is None
    for place in range(0, size, max(1, size // 50)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert "other contents" in damage_in(path, noted)
    path.write_bytes(content)
    assert damage_in(path, noted) is None


def test_lost_and_cut_files_of_a_folder_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b").write_text("bb")
    (tmp_path / "a").write_text("a")
    noted = contents_of(tmp_path)
    assert list(noted) == ["a", "in/b"] and noted["a"] == [1, digest_of(tmp_path / "a")]
    (tmp_path / "new").write_text("is no damage")
    assert damage_in(tmp_path, noted) is None
    (tmp_path / "in" / "b").write_text("b")
    assert damage_in(tmp_path, noted) == f"{tmp_path / 'in' / 'b'} has 1 bytes, but 2 were written"
    (tmp_path / "in" / "b").unlink()
    assert damage_in(tmp_path, noted) == f"{tmp_path / 'in' / 'b'} is missing"
