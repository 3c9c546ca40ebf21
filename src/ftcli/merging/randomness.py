"""Random bits that depend on nothing but the seed, the tensor, the model, and the position in the tensor.

Philox counts: block c of the stream of a key is a function of (key, c). So any piece of a tensor can be drawn by itself, by any thread
and in any order, after a kill as before it. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORDS_PER_BLOCK = 8  # Philox 4x64 gives four words of 64 bits a block, read as eight of 32


@dataclass(frozen=True, slots=True)
class Randomness:
    """The random bits of one tensor."""

    seed: int
    tensor: str
    models: tuple[str, ...]
    """A name for each model, as the recipe says it; the same bits for the same name."""

    def bits(self, model: int, start: int, count: int) -> NDArray[np.uint32]:
        """``(count,)`` uniform 32-bit words, those at positions `start` and on of the tensor's stream for `model`."""
        name = self.models[model] if model < len(self.models) else str(model)
        digest = hashlib.sha256("\0".join((str(self.seed), self.tensor, name)).encode()).digest()
        skipped, lead = divmod(start, _WORDS_PER_BLOCK)
        key = np.frombuffer(digest[:16], np.uint64)
        generator = np.random.Philox(key=key, counter=skipped)
        num_words = -(-(lead + count) // 2)
        words: NDArray[np.uint32] = np.asarray(generator.random_raw(num_words), np.dtype("<u8")).view(np.dtype("<u4"))
        return words[lead : lead + count]


def kept(bits: NDArray[np.uint32], probability: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    """True with `probability`, exact to 2^-32."""
    threshold = np.minimum(np.rint(np.asarray(probability) * 2.0**32), 2.0**32)
    return bits < threshold.astype(np.uint64)
