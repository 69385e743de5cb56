"""A data order without a state: which item the n-th sample of a run is.

Time is counted in samples. The permutation of an epoch is a function of (seed, epoch), and a place in it a function of
the sample number, so that a resume, another number of processes or another micro-batch changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from mutor_img.streams import Stream, generator_seed


class StatelessOrder:
    """Shuffled epochs over ``size`` items: every item once an epoch, each epoch in another order."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def items(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return item indices and epochs of global sample numbers, (B,) int64 each."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.size)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = self._permutation(int(epoch))[places[chosen]]
        return items, epochs

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return the epoch's (size,) permutation; the two last made are kept: a batch at an epoch's end spans two."""
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(generator_seed(self.seed, Stream.ORDER, epoch))
            self._permutations[epoch] = torch.randperm(self.size, generator=generator).numpy()
            for old in list(self._permutations)[:-2]:
                del self._permutations[old]
        return self._permutations[epoch]
