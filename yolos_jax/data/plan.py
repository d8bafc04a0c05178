"""Plans which images share a batch, and how long its sequences are, from image sizes alone."""

from collections.abc import Sequence

import numpy as np

from yolos_jax.data.streams import Stream, generator
from yolos_jax.patches import round_up


def choose_lengths(counts: np.ndarray, most: int, how_many: int, special: int = 101) -> tuple[int, ...]:
    """At most `how_many` bucket lengths for sequences of `counts` patches, the last holding `most`.

    Every sequence is padded to the next length; the lengths minimise the total padding. With
    the `special` tokens ([CLS] and [DET]) each length is a multiple of a power of two, since fused
    kernels work in tiles.
    """
    tile = 1 << min(max(int(np.log2(most / 32)), 3), 7)  # 128 for COCO at 800 pixels, 8 at least
    up = lambda n: round_up(n + special, tile) - special
    ends = np.arange(up(1), up(most) + tile, tile)
    slot = np.searchsorted(ends, up(np.asarray(counts)))
    images = np.concatenate([[0], np.cumsum(np.bincount(slot, minlength=len(ends)))])
    # padded[i, j]: the padded total of the images in slots i to j, all with the length ends[j]
    padded = (images[1:] - images[:-1, None]) * ends.astype(float)
    padded[np.tri(len(ends), k=-1, dtype=bool)] = np.inf  # j < i
    # least[j]: the least padded total of slots 0 to j, the last length being ends[j]
    least, previous = padded[0], []
    for _ in range(1, min(how_many, len(ends))):
        table = np.append(np.inf, least[:-1])[:, None] + padded  # [i, j]: slots i to j have ends[j]
        least = table.min(axis=0)
        previous.append(table.argmin(axis=0))
    j, chosen = len(ends) - 1, []
    for before in reversed(previous):
        chosen.append(int(ends[j]))
        j = before[j] - 1
    return tuple(reversed([*chosen, int(ends[j])]))


def plan(
    counts: np.ndarray, lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batches of an epoch.

    Images of similar length share a batch. The images that do not fill a batch of their own length are
    joined with those of the next, so only the last len(counts) % batch_size images of the shuffled
    order are dropped, as in the reference.

    Args:
        counts: patches of each record in this epoch [n]; lengths: bucket lengths, ascending.

    Returns:
        record indices int64 [steps, batch_size] and the bucket length of each step int64 [steps].
    """
    counts, lengths = np.asarray(counts), np.asarray(lengths)
    rng = generator(Stream.ORDER, seed, epoch)
    steps = len(counts) // batch_size
    order = rng.permutation(len(counts))[: steps * batch_size]
    bucket = np.searchsorted(lengths, counts[order])
    full, left = [], order[:0]
    for b in range(len(lengths)):
        members = np.concatenate([left, order[bucket == b]])
        whole = len(members) // batch_size * batch_size
        full.append(members[:whole].reshape(-1, batch_size))
        left = members[whole:]
    batches = np.concatenate(full).astype(np.int64)[rng.permutation(steps)]
    longest = np.searchsorted(lengths, counts[batches].max(axis=1))
    return batches, lengths[longest]


def in_order(counts: np.ndarray, lengths: Sequence[int], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The batches of an evaluation: every record once, short ones first; -1 fills the last batch."""
    order = np.argsort(counts, kind='stable')
    batches = np.concatenate([order, np.full(-len(order) % batch_size, -1)]).reshape(-1, batch_size)
    longest = np.where(batches >= 0, np.asarray(counts)[batches], 0).max(axis=1)
    return batches, np.asarray(lengths)[np.searchsorted(lengths, longest)]


def waste(counts: np.ndarray, batches: np.ndarray, lengths: np.ndarray) -> float:
    """The share of a plan's patch tokens that is padding."""
    return 1 - counts[batches].sum() / (lengths.sum() * batches.shape[1])
