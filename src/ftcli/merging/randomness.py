"""Random bits that depend on nothing but the seed, the tensor, the model, and the position in the tensor.

Philox counts: block c of the stream of a key is a function of (key, c). So any piece of a tensor can be drawn by itself, by any thread
and in any order, after a kill as before it. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_WORDS_PER_BLOCK = 16  # Philox 4x64 gives four words of 64 bits a block, read as sixteen of 16
_WORD = 2**16


@dataclass(frozen=True, slots=True)
class Chances:
    """Probabilities, exact to 2^-32, in two parts: most draws are decided by their first 16 bits."""

    high: NDArray[np.uint16]
    """A first word below it is kept, one above is not."""
    low: NDArray[np.int64]
    """Where the first word is `high`, a second one below this is kept."""

    @classmethod
    def of(cls, probabilities: float | NDArray[np.float64]) -> Chances:
        thresholds = np.rint(np.asarray(probabilities, np.float64) * 2.0**32).astype(np.int64)
        high = np.minimum(thresholds >> 16, _WORD - 1)
        return cls(high.astype(np.uint16), thresholds - (high << 16))


def plain_name(reference: str) -> str:
    """A model's name for its random bits: the same for `a`, `./a` and `a/`.

    It is what the recipe says and not where the folder is: a recipe that is moved with its models keeps its bits.

    Example:
        >>> plain_name("./a/../b/"), plain_name("runs/a+./adapter"), plain_name("org/model@main")
        ('b', 'runs/a+adapter', 'org/model@main')
    """
    return "+".join(posixpath.normpath(part) if part else part for part in reference.split("+"))


@dataclass(frozen=True, slots=True)
class Randomness:
    """The random bits of one tensor."""

    seed: int
    tensor: str
    models: tuple[str, ...]
    """A plain name for each model; the same bits for the same name."""

    def _digest(self, model: int) -> bytes:
        name = self.models[model] if model < len(self.models) else str(model)
        return hashlib.sha256("\0".join((str(self.seed), self.tensor, name)).encode()).digest()

    def words(self, model: int, start: int, count: int) -> NDArray[np.uint16]:
        """``(count,)`` uniform 16-bit words, those at positions `start` and on of the tensor's stream for `model`."""
        skipped, lead = divmod(start, _WORDS_PER_BLOCK)
        generator = np.random.Philox(key=np.frombuffer(self._digest(model)[:16], np.uint64), counter=skipped)
        num_drawn = -(-(lead + count) // 4)
        words: NDArray[np.uint16] = np.asarray(generator.random_raw(num_drawn), np.dtype("<u8")).view(np.dtype("<u2"))
        return words[lead : lead + count]

    def kept(self, model: int, start: int, shape: tuple[int, int], chances: Chances, order: NDArray[np.intp] | None = None) -> Mask:
        """True with the probability of `chances`.

        Args:
            start: position of the first element.
            shape: rows and columns of what is asked for, at positions from `start` on.
            chances: one for all elements, or one for each column.
            order: ``shape``: the elements counted from `start`, in the order in which they meet the columns of `chances`.
        """
        words = self.words(model, start, shape[0] * shape[1])
        words = words.reshape(shape) if order is None else words[order]
        mask: Mask = words < chances.high
        if chances.low.any():
            limits = np.broadcast_to(chances.low, shape).reshape(-1)
            for place in np.flatnonzero(words == chances.high).tolist():
                position = start + (place if order is None else int(order.reshape(-1)[place]))
                mask.reshape(-1)[place] = self._second_word(model, position) < limits[place]
        return mask

    def _second_word(self, model: int, position: int) -> int:
        """16 more bits of a position; one in 65,536 needs them."""
        return int.from_bytes(hashlib.sha256(self._digest(model) + position.to_bytes(8, "little")).digest()[:2], "little")
