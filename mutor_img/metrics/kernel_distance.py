"""Kernel distance between two sets of features (KID, where the features are Inception's).

Source: Binkowski et al. 2018: the unbiased squared MMD under (x.y / D + 1)^3, a mean over random subsets.
"""

from __future__ import annotations

from torch import Tensor

from mutor_img.common.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
    """Return the mean over 100 pairs of subsets of 1000 images (of all, where there are fewer).

    It has no bias, and can fall a little below 0. Its spread between subsets does depend on their size.

    Args:
        samples: (N, D) float features.
        reference: (M, D) float features.
        seed: of the subsets.

    Raises:
        UserError: fewer than two images on a side.
    """
    size = min(SUBSET_SIZE, len(samples), len(reference))
    if size < 2:
        raise UserError("the kernel distance needs at least 2 samples and 2 reference images")
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # seconds to import

    return kid_features_to_metric(samples.double(), reference.double(), kid_subsets=SUBSETS, kid_subset_size=size,
                                  kid_kernel="poly", rng_seed=seed, verbose=False)[KEY_METRIC_KID_MEAN]
