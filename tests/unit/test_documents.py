"""Documents are known by their text, however it was composed or spelled in JSON."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.documents import Document, document_id, valid_unicode


@given(st.text())
def test_an_id_does_not_depend_on_how_accents_are_composed(text):
    composed, split = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert document_id(composed) == document_id(split)


@given(st.text(), st.text())
def test_ids_differ_where_texts_differ(one, other):
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    assert (document_id(one) == document_id(other)) == same


def test_text_is_kept_as_it_came():
    split = unicodedata.normalize("NFD", "é")
    assert Document.of(split, "here").text == split


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [(r'"\ud83d\ude00"', "😀"), (r'"a\ud83d"', "a\ufffd"), (r'"\ude00b"', "\ufffdb"), ('"plain"', "plain")],
)
def test_lone_surrogates_of_json_become_the_replacement_character(spelled, expected):
    text = valid_unicode(json.loads(spelled))
    assert text == expected
    assert text.encode().decode() == text
