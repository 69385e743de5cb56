"""YAML whose plain words stay the text that was typed, and whose keys stand once.

YAML 1.1 turns ``0010`` into 8, ``2024-01-01`` into a date, ``on`` into true and ``1:30`` into 90. What a word means is
for the field that it is given to: whoever reads a file here converts text by the field's type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import yaml

from mutor_img.common.errors import UserError, first_line

DEEPEST = 20  # levels of lists and mappings; an alias to what holds it would never end
_MOST = 100_000  # values, those of an alias at each of its places: a few lines of aliases can stand for billions
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


class Null(str):
    """A word that YAML reads as nothing: ``null``, ``~`` or no word at all."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (the loader's own class attribute)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Return a mapping; a key that stands twice is refused, since YAML would drop the first without a word."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Twice(f"line {line}: the key {key.value!r} is there twice, first in line "
                             f"{lines[key.value]}; keep one")
            lines[key.value] = line
        return node


class _Twice(Exception):
    pass


class _TooMany(Exception):
    pass


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


def _null(loader: _Loader, node: yaml.ScalarNode) -> Null:
    return Null(loader.construct_scalar(node))


_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])
_Loader.add_constructor(_NULL, _null)
for _name in ("bool", "int", "float", "binary", "timestamp", "merge"):  # by an explicit !!int, or << as a value
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _text)


def parse(text: str, origin: str) -> Any:
    """Return the lists, dictionaries and words of a YAML text; every word is a ``str``, an empty one a :class:`Null`.

    Raises:
        UserError: it is not YAML, a key stands twice, or it is nested too deeply; ``origin`` is what is named.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _check_size(value, DEEPEST, count(1))
    except (_Twice, _TooMany) as error:
        raise UserError(f"{origin}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        alias = "alias" in f"{error.context} {error.problem}"
        quotes = "; put quotes around what begins with *, as in ['*.weight']" * alias
        raise UserError(f"{origin}: not valid YAML ({where}{error.problem or error.context}){quotes}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: not valid YAML ({first_line(error)})") from None
    except RecursionError:
        raise UserError(f"{origin}: lists or mappings are nested more than {DEEPEST} deep") from None
    return value


def is_null(text: str) -> bool:
    """Tell whether YAML reads a plain word as nothing."""
    return text in ("", "~", "null", "Null", "NULL")


def _check_size(value: Any, left: int, numbers: Iterator[int]) -> None:
    if not left:
        raise RecursionError
    if next(numbers) > _MOST:
        raise _TooMany(f"more than {_MOST} values; write fewer lists, or fewer aliases of them")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_size(inner, left - 1, numbers)
