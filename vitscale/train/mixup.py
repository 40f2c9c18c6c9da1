"""Mixup (arXiv 1710.09412): neighbouring images of a batch are blended, and their labels with them.

As in big_vision (``utils.py``), one share holds for all images of a step, and it is a half at least. Slots 2k and
2k + 1 of the global batch are partners, so no blend depends on the number of ranks or the size of a micro-batch.
Which images these are is up to the order of samples, which is random anyway. B micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitscale.data.order import hash64

# Salt that keeps the shares apart from the data's randomness and from dropout's.
MIXUP = 0x313B


def mixing_share(seed: int, step: int, alpha: float) -> float:
    """What an image keeps of itself in a step: max(a, 1 - a), a drawn from Beta(alpha, alpha).

    Args:
        seed: of the run.
        step: decides the draw together with the seed, so that no random state needs saving.
        alpha: 0 for no mixup: then it is 1.
    """
    if not alpha:
        return 1.0
    drawn = hash64(seed, MIXUP, step)
    # NumPy promises the numbers of its legacy generator across versions; those of the others may change.
    share = float(np.random.RandomState([drawn >> 32, drawn & 0xFFFFFFFF]).beta(alpha, alpha))
    return max(share, 1 - share)


def partners(values: Tensor) -> Tensor:
    """Each entry's partner in its place. values [B, ...], B even."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def blend(images: Tensor, share: float) -> Tensor:
    """``share`` of each image and the rest of its partner. images float [B, ...], B even."""
    return torch.lerp(partners(images), images, share)
