"""The words of a caption, and the vocabulary that a codec knows."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mmebm.data.base import check_count

__all__ = ["END", "UNKNOWN", "Vocabulary", "join", "tokens"]

END: Final = "<eos>"
UNKNOWN: Final = "<unk>"

# A word keeps its inner apostrophe (bird's, o'clock); everything else that is no space stands alone. UNKNOWN is one
# token, so that what a codec decodes can be encoded again.
TOKEN: Final = re.compile(r"<unk>|[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
NO_SPACE_BEFORE: Final = frozenset(",.;:!?)]}%-/")
NO_SPACE_AFTER: Final = frozenset("([{-/")


def tokens(text: str) -> list[str]:
    """The words of a caption in lower case, every punctuation mark apart: ``["a", "small", "bird", "."]``."""
    return TOKEN.findall(unicodedata.normalize("NFC", text.lower()))


def join(words: Iterable[str]) -> str:
    """Words to a caption, with the spaces where they are usually written; ``tokens(join(tokens(t))) == tokens(t)``."""
    text, last = "", ""
    for word in words:
        text += word if not text or word in NO_SPACE_BEFORE or last in NO_SPACE_AFTER else f" {word}"
        last = word
    return text


@dataclass(frozen=True)
class Vocabulary:
    """The words a codec knows. Number 0 is the end of a caption, which also fills it up; 1 is any unknown word.

    Args:
        words: distinct, beginning with :data:`END` and :data:`UNKNOWN`.

    Raises:
        ValueError: if ``words`` are not as said.
    """

    words: tuple[str, ...]
    _number: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.words[:2] != (END, UNKNOWN) or len(set(self.words)) != len(self.words):
            raise ValueError(f"words must be distinct and begin with {END!r}, {UNKNOWN!r}, got {self.words[:4]}...")
        object.__setattr__(self, "_number", {word: k for k, word in enumerate(self.words)})

    @classmethod
    def of(cls, captions: Iterable[str], *, least: int = 1) -> Vocabulary:
        """The words that occur at least ``least`` times in ``captions``, the most frequent first."""
        least = check_count("least", least)
        counts = Counter(word for caption in captions for word in tokens(caption))
        known = [word for word, count in counts.items() if count >= least and word != UNKNOWN]
        return cls((END, UNKNOWN, *sorted(known, key=lambda word: (-counts[word], word))))

    def __len__(self) -> int:
        """How many words there are, the two special ones included."""
        return len(self.words)

    def numbers(self, captions: Sequence[str], length: int) -> Tensor:
        """Captions as numbers of words.

        Args:
            captions: ``n`` captions.
            length: places for words, the end included: a caption of more than ``length - 1`` words is cut there.

        Returns:
            int64 ``(n, length)``; 0 from the end of the caption on.
        """
        table = np.zeros((len(captions), length), dtype=np.int64)
        for row, caption in zip(table, captions):
            found = [self._number.get(word, 1) for word in tokens(caption)[: length - 1]]
            row[: len(found)] = found
        return torch.from_numpy(table)

    def captions(self, numbers: Tensor) -> list[str]:
        """The captions that int64 ``(n, length)`` numbers of words stand for, each up to its first end."""
        out = []
        for row in numbers.tolist():
            end = row.index(0) if 0 in row else len(row)
            out.append(join(self.words[k] for k in row[:end]))
        return out
