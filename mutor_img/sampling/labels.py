"""Which class each sample is of, and what classes are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mutor_img.common.errors import UserError, check_choice, suggest
from mutor_img.common.streams import Stream, bits, integers
from tokenizer.images import source

RULES = ("random", "balanced")


def make_labels(rule: str, classes: Sequence[int], count: int, seed: int) -> Tensor:
    """Return the labels of samples 0 .. count - 1, as a function of the arguments alone.

    Args:
        rule: ``"random"``: each label drawn on its own, f(seed, i), whatever ``count`` is (the protocol of LlamaGen and
            of the paper). ``"balanced"``: every class count / len(classes) times, what is left over given to classes
            that the seed picks, in an order that the seed permutes.
        classes: labels to choose from.

    Returns:
        (count,) int64.

    Raises:
        UserError: an unknown rule.
    """
    check_choice("labels", rule, RULES)
    table, samples = torch.tensor(classes), torch.arange(count)
    if rule == "random":
        return table[integers(len(classes), seed, Stream.LABEL, samples)]
    # A second key keeps these draws apart from those above: 0 shuffles the classes, 1 the samples.
    shuffled = table[bits(seed, Stream.LABEL, 0, torch.arange(len(classes))).argsort(stable=True)]
    order = bits(seed, Stream.LABEL, 1, samples).argsort(stable=True)  # (count,), a permutation
    return torch.empty_like(order).index_copy(0, order, shuffled[samples % len(classes)])


def readable_names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """Return a name for each class: WordNet ids become words; 1000 classes without names are ImageNet's."""
    if class_names is None:
        if classes != 1000:
            return [str(label) for label in range(classes)]
        class_names = source.imagenet_words()
    return source.class_names(list(class_names))


def parse_classes(text: str, names: Sequence[str], class_names: Sequence[str] | None = None,
                  flag: str = "--classes") -> list[int]:
    """Return the labels in a comma-separated list of names, WordNet ids and numbers.

    Args:
        text: e.g. ``"207,otter,n02510455"``. A word is a class's name before it is a number, and refused where it is
            one class's name and another's number; ``name:10`` and ``label:10`` say which is meant. Case and ``_`` for a
            space do not matter. ImageNet's classes answer to all of their synonyms.
        names: a readable name for each class.
        class_names: as the run calls them, where that differs.
        flag: what messages call the list.

    Raises:
        UserError: an unknown class (the nearest is named), a word for several, a class given twice.
    """
    aliases = _aliases(names, class_names)
    labels = [_find(word.strip(), names, aliases, flag) for word in text.split(",")]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{flag}: class {label} is given twice")
    return labels


def class_words(labels: Sequence[int], names: Sequence[str], class_names: Sequence[str] | None = None) -> str:
    """Return the list that :func:`parse_classes` reads as these labels: numbers, which name no other class."""
    called: dict[int, set[int]] = {}  # the classes whose name is a number, by that
    for label, known in enumerate(_aliases(names, class_names)):
        for name in filter(_is_number, {_plain(names[label]), *known}):
            called.setdefault(int(name), set()).add(label)
    return ",".join(f"{'' if called.get(label, {label}) == {label} else 'label:'}{label}" for label in labels)


def _find(word: str, names: Sequence[str], aliases: Sequence[set[str]], flag: str) -> int:
    """Return the one class that a word means."""
    way, colon, rest = word.partition(":")
    if not colon or way not in ("name", "label") or _called(word, names, aliases):
        way, rest = "", word
    named = [] if way == "label" else _called(rest, names, aliases) or _same_number(rest, names, aliases)
    numbered = [int(rest)] if way != "name" and _is_number(rest) and int(rest) < len(names) else []
    if rest[:1] == "0" and len(rest) > 1 and _called(rest, names, aliases):
        numbered = []  # 010 is how nobody writes a number, and just how that class is called
    if len(named) > 1:
        raise UserError(f"{flag}: {word!r} is the name of classes {', '.join(map(str, named))}; give a number, "
                        f"label:{named[0]}")
    found = {*named, *numbered}
    if len(found) > 1:
        raise UserError(f"{flag}: {word!r} is the name of class {named[0]} and the number of class {numbered[0]} "
                        f"({names[numbered[0]]!r}); give name:{rest} or label:{rest}")
    if not found:
        raise UserError(f"{flag}: unknown class {word!r}{_hint(rest, names, aliases)}")
    return found.pop()


def _called(word: str, names: Sequence[str], aliases: Sequence[set[str]]) -> list[int]:
    """Return the classes of a name: those that are shown by it, else those that also answer to it."""
    found = [label for label, name in enumerate(names) if _plain(name) == _plain(word)]
    return found or [label for label, known in enumerate(aliases) if _plain(word) in known]


def _same_number(word: str, names: Sequence[str], aliases: Sequence[set[str]]) -> list[int]:
    """Return the classes whose name is this number in other digits, as ``010`` is 10."""
    return [label for label, known in enumerate(aliases) if _is_number(word) and any(
        _is_number(name) and int(name) == int(word) for name in {_plain(names[label]), *known})]


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", word) is not None


def _hint(word: str, names: Sequence[str], aliases: Sequence[set[str]]) -> str:
    if re.fullmatch(r"-?[0-9]+", word):
        return f"; the model has classes 0 to {len(names) - 1}"
    hint = suggest(_plain(word), {*map(_plain, names), *(alias for known in aliases for alias in known)})
    if len(hint) > 200:  # nothing near, and too many to list
        return f"; give a number from 0 to {len(names) - 1}, a name or a WordNet id"
    return hint


def _aliases(names: Sequence[str], class_names: Sequence[str] | None) -> list[set[str]]:
    """Return what else each class may be called: the run's own word, and for ImageNet's the WordNet id and synonyms."""
    own = class_names or (list(source.imagenet_words()) if len(names) == 1000 else names)
    words = source.imagenet_words() if any(map(source.is_wordnet_id, own)) else {}  # seconds, for ImageNet only
    return [{_plain(word), *(map(_plain, words[word].split(",")) if word in words else ())} for word in own]


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").casefold()
