"""A data order without a state: which item the n-th sample of a run is, and its codes.

Time is counted in samples. The permutation of an epoch is a function of (seed, epoch), and a place in it a function of
the sample number, so that a resume, another number of processes or another micro-batch changes nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mutor_img.common.errors import UserError
from mutor_img.common.streams import Stream, generator_seed, integers
from mutor_img.data.store import Codes


class StatelessOrder:
    """Shuffled epochs over ``size`` items: every item once per epoch, each epoch in another order."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def items(self, samples: np.ndarray) -> np.ndarray:
        """Return the item indices of global sample numbers, (B,) int64 both."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.size)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = self._permutation(int(epoch))[places[chosen]]
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return the epoch's (size,) permutation; the two last made are kept: a batch at an epoch's end spans two."""
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(generator_seed(self.seed, Stream.ORDER, epoch))
            self._permutations[epoch] = torch.randperm(self.size, generator=generator).numpy()
            for old in list(self._permutations)[:-2]:
                del self._permutations[old]
        return self._permutations[epoch]


class TrainingCodes:
    """The sequences of a run: one code store, or several of the same images (other crops of them).

    An epoch sees every image once. Which store its codes come from is drawn evenly, then one of that store's views
    evenly: LlamaGen's order over its ten-crops at 1.1 and 1.05. Both draws, and the image, are functions of (seed,
    sample number). Codes stay in the files; a batch copies its own rows.

    Args:
        stores: the code stores, opened.
        seed: the run's seed.

    Raises:
        UserError: stores that differ in tokenizer, grid, vocabulary, classes or images.
    """

    def __init__(self, stores: Sequence[Codes], seed: int):
        self.stores, self.seed = list(stores), seed
        for store in self.stores[1:]:
            _check_same_images(self.stores[0], store)
        self.order = StatelessOrder(len(self.stores[0]), seed)

    def __len__(self) -> int:
        return len(self.stores[0])

    def batch(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return codes (B, N) int64 and labels (B,) int64 of global sample numbers (B,) int64, on the CPU."""
        images = self.order.items(samples)  # (B,)
        numbers = torch.from_numpy(samples)
        if len(self.stores) == 1:
            return self.stores[0].batch(images, self._views(self.stores[0], numbers))
        chosen = integers(len(self.stores), self.seed, Stream.VIEW, numbers, 1).numpy()  # (B,): a store for each
        codes = torch.empty(len(samples), self.stores[0].codes.shape[2], dtype=torch.int64)  # (B, N)
        for index, store in enumerate(self.stores):
            rows = np.flatnonzero(chosen == index)
            codes[rows] = store.batch(images[rows], self._views(store, numbers[rows]))[0]
        return codes, torch.from_numpy(self.stores[0].labels[images])

    def _views(self, store: Codes, numbers: Tensor) -> np.ndarray:
        return integers(len(store.info.views), self.seed, Stream.VIEW, numbers).numpy()


def check_same_codes(first: Codes, other: Codes) -> None:
    """Check that codes and labels of two stores mean the same: tokenizer, grid, vocabulary, and classes in their order.

    Raises:
        UserError: naming both stores and the first thing that differs.
    """
    a, b = first.info, other.info
    both = f"{other.folder} and {first.folder} cannot be mixed: "
    if a.tokenizer_hash != b.tokenizer_hash:
        raise UserError(f"{both}made by tokenizer {b.tokenizer_hash[:12]} and by tokenizer {a.tokenizer_hash[:12]}; "
                        "encode one of them again")
    for name, mine, its in (("grid", tuple(a.grid), tuple(b.grid)), ("vocabulary", a.vocabulary, b.vocabulary),
                            ("number of classes", len(a.class_names), len(b.class_names)),
                            ("image_size", a.image_size, b.image_size)):
        if mine != its:
            raise UserError(f"{both}their {name} is {its} and {mine}; encode one of them again as the other")
    for label, (mine, its) in enumerate(zip(a.class_names, b.class_names)):
        if mine != its:
            raise UserError(f"{both}class {label} is {its!r} in the first and {mine!r} in the second; encode one of "
                            "them again with the other's list of classes (tokenizer.encode --classes)")


def _check_same_images(first: Codes, other: Codes) -> None:
    """Raise :class:`UserError` unless two stores hold codes of the same images that mean the same."""
    check_same_codes(first, other)
    both = f"{other.folder} and {first.folder} cannot be mixed: "
    if len(first) != len(other):
        raise UserError(f"{both}they hold {len(other)} and {len(first)} images; give stores of the same images")
    a, b = first.info.images_hash, other.info.images_hash
    if (a and b and a != b) or not np.array_equal(first.labels, other.labels):
        raise UserError(f"{both}they hold other images, or the same in another order; encode both from one folder")
