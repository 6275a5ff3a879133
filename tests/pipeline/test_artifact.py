"""A product is done when its content is what was written; what was changed since is named, with what to do."""

from __future__ import annotations

import json

import pytest

from lowdft.errors import UserError
from lowdft.files import conceal
from lowdft.files.atomic import _concealed
from lowdft.pipeline.artifact import Product


@pytest.fixture
def product(tmp_path) -> Product:
    made = Product(tmp_path / "adapter", {"seed": 1, "rate": 1e-4, "layers": ("a", "b")})
    made.begin()
    assert not made.is_done()
    made.path.mkdir()
    (made.path / "weights").write_bytes(b"0123456789")
    made.finish(rows=3)
    assert made.is_done() and made.facts() == {"rows": 3}
    return made


@pytest.mark.parametrize(
    "content, words",
    [(None, "weights is missing"), (b"", "0 bytes, but 10 were"), (b"01234", "5 bytes"), (b"0123456788", "other cont")],
)
def test_changed_content_is_an_error(product, content, words):
    weights = product.path / "weights"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(UserError, match=f"{words}.*changed, cut or damaged.*delete .*adapter and adapter.man"):
        product.is_done()


def test_files_added_later_are_no_damage(product):
    (product.path / "README.md").write_text("the card")
    assert product.is_done()


def test_every_flipped_bit_of_a_manifest_is_found_or_harmless(product):
    """As an error, as not JSON, or as other settings."""
    text = product.manifest.read_bytes()
    known = json.loads(text)
    for place in range(len(text)):
        product.manifest.write_bytes(text[:place] + bytes([text[place] ^ 1 << place % 7]) + text[place + 1 :])
        try:
            assert product.is_done() and product.facts() == {"rows": 3}
        except UserError:
            continue
        found = json.loads(product.manifest.read_bytes())
        assert {k: v for k, v in found.items() if known.get(k) == v}.keys() >= known.keys() - {"checksum"}


def test_manifests_that_are_no_manifest_are_told(product):
    for text in ("null", "[]", "{}", '{"done": true}', ""):
        product.manifest.write_text(text)
        with pytest.raises(UserError, match="adapter.manifest.json"):
            product.is_done()


def test_what_comes_from_the_environment_is_not_in_a_manifest(tmp_path):
    """And still matches when it is read again."""
    conceal("canary-d41d8cd9", "${oc.env:CANARY}")
    made = Product(tmp_path / "a.json", {"system_prompt": "canary-d41d8cd9"})
    made.path.write_text("{}")
    made.finish()
    assert "canary" not in made.manifest.read_text() and made.is_done()
    _concealed.clear()


def test_differing_settings_are_named_whole(product):
    """However long their values are, for they differ somewhere."""
    long = "a system prompt that " * 9
    product.made_from["strategy"] = long + "ends so"
    with pytest.raises(UserError) as error:
        Product(product.path, product.made_from).is_done()
    assert f"is now '{long}ends so'" in str(error.value)
