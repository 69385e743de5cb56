"""Words stay as they were typed, keys stand once, and no YAML ends in a traceback."""

import pytest

from mutor_img.common.errors import UserError
from mutor_img.common.plain_yaml import Null, parse

TYPED = ["0010", "0x10", "1:30", "2024-01-01", "2001-12-14t21:59:43.10-05:00", "1e3", "1_000", "on", "off", "yes", "No",
         "true", ".inf", "<<", "="]


@pytest.mark.parametrize("word", TYPED)
def test_a_word_is_the_text_that_was_typed(word):
    assert parse(f"a: {word}\nb: [{word}, '{word}']\nc: !!int {word}\n", "x") == {"a": word, "b": [word] * 2, "c": word}


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", ""])
def test_a_word_for_nothing_is_told_from_the_same_in_quotes(word):
    found = parse(f"a: {word}\nb: '{word}'\n", "x")
    assert found == {"a": word, "b": word} and isinstance(found["a"], Null) and not isinstance(found["b"], Null)


@pytest.mark.parametrize("text, line, first", [
    ("a: 1\nb: 2\na: 3\n", 3, 1), ("o:\n  lr: 1\n  'lr': 2\n", 3, 2), ("o: {lr: 1, lr: 1}\n", 1, 1),
    ("- {a: 1}\n- b: 1\n  b: 2\n", 3, 2), ("1: x\n'1': y\n", 2, 1), ("x: {k: [{a: 1,\n  a: 2}]}\n", 2, 1),
])
def test_a_key_that_stands_twice_is_refused_with_its_lines(text, line, first):
    with pytest.raises(UserError, match=rf"^f\.yaml: line {line}: the key '\w+' .*twice, first in line {first}"):
        parse(text, "f.yaml")


def test_an_anchor_may_be_merged_and_overridden():
    assert parse("a: &a {p: 1, q: 2}\nb: {<<: *a, p: 3}\n", "x")["b"] == {"p": "3", "q": "2"}


@pytest.mark.parametrize("text", [
    "{", "[1", "a: b: c", "'x", "&a [*a]", "&a {k: *a}", "*a", "? [a]\n: b", "!!python/object/apply:os.system [ls]",
    "%x", "@x", "\x00", "- a\n---\n- b", "{" * 400, "[" * 400 + "]" * 400, "a:\n\t- b", "!!timestamp [1]",
])
def test_what_cannot_be_read_is_one_line_that_names_the_file(text):
    with pytest.raises(UserError) as caught:
        parse(text, "f.yaml")
    assert str(caught.value).startswith("f.yaml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[*.weight]", "[*norm*]", "a: *norm.weight"])
def test_a_pattern_that_yaml_takes_for_an_alias_is_told_to_be_quoted(text):
    with pytest.raises(UserError, match=r"not valid YAML \(.*\); put quotes around what begins with \*"):
        parse(text, "x")
