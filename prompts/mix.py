"""The training prompts of a run: the corpora of a recipe, their mix, and the prompts held out of it.

The mix is a pure function of the batch's index and keeps no position, so every rank can compute every batch, and a resumed run continues
with the next sample.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import heapq
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .common_text import COUNTS, common_text
from .corpora import Corpus, Prompt, PromptError, read_compbench, read_file


def read_corpus(corpus: Corpus, split: Literal["train", "validation"] = "train", seed: int = 0) -> list[Prompt]:
    """The prompts of one corpus of a recipe, at most `limit`.

    `split` selects the files of a T2I-CompBench folder and the split of CommonText; `seed` is CommonText's. Raises PromptError.
    """
    if corpus.kind == "common_text":
        return common_text(split, corpus.limit or COUNTS[split], seed, corpus.mix or "varied")
    if corpus.kind == "compbench":
        return read_compbench(corpus.path, split, corpus.limit)
    return read_file(corpus.path, corpus.kind, corpus.column, corpus.limit)


def _rank_of(seed: int, text: str) -> bytes:
    """The sort key by which held-out prompts are chosen: pseudorandom and reproducible."""
    return hashlib.blake2b(text.encode(), key=f"hold out {seed}".encode(), digest_size=16).digest()


def _shares(weights: Sequence[int], count: int) -> list[int]:
    """`count` divided in proportion to the weights into integers, the largest remainders rounded up."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares


def hold_out(corpora: Sequence[tuple[Sequence[Prompt], int]], count: int, seed: int) -> list[Prompt]:
    """`count` different prompts for validation, from each (prompts, repeat) in proportion to its share of an epoch.

    In a run of several stages, hold out of all corpora together and pass the result to each stage's PromptMix. Raises PromptError.
    """
    _check(corpora)
    chosen: dict[str, Prompt] = {}
    for (prompts, _), share in zip(corpora, _shares([len(prompts) * repeat for prompts, repeat in corpora], count), strict=True):
        free = {prompt.text: prompt for prompt in prompts if prompt.text not in chosen}
        if share and share >= len(free):
            problem = f"{count} prompts cannot be held out: {share} of them would come from a corpus with {len(free)} different prompts."
            raise PromptError(problem, "lower validation.prompts, or use a larger corpus.")
        first = heapq.nsmallest(share, free, key=functools.partial(_rank_of, seed))
        chosen |= {text: free[text] for text in first}
    return [chosen[text] for text in sorted(chosen, key=functools.partial(_rank_of, seed))]


def _check(corpora: Sequence[tuple[Sequence[Prompt], int]]) -> None:
    """Raise PromptError for no corpus, an empty one or a repeat below 1."""
    if not corpora:
        raise PromptError("There is no corpus to train on.", "add a corpus to the stage.")
    for number, (prompts, repeat) in enumerate(corpora, start=1):
        if not prompts:
            raise PromptError(f"Corpus {number} of {len(corpora)} is empty.", "remove it from the recipe, or add prompts to it.")
        if repeat < 1:
            raise PromptError(f"Corpus {number} of {len(corpora)} is repeated {repeat} times.", "write repeat = 1 or more.")


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of range(length) for this seed and epoch."""
    # Of NumPy's generators only RandomState is guaranteed to stay reproducible (NEP 19).
    key = np.frombuffer(hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=32).digest(), dtype="<u4")
    return np.random.RandomState(key).permutation(length).astype(np.uint32)


class PromptMix:
    """An endless sequence of prompts: every epoch contains each prompt of each corpus `repeat` times, in a new order.

    `corpora` are (prompts, repeat); `held_out` is how many prompts to keep for validation, or those prompts (from `hold_out`). No batch
    contains the text of a held-out prompt, from whichever corpus. Raises PromptError if nothing is left of a corpus.
    """

    def __init__(self, corpora: Sequence[tuple[Sequence[Prompt], int]], seed: int, held_out: int | Sequence[Prompt] = 0) -> None:
        _check(corpora)
        self.seed = seed
        self.held_out = hold_out(corpora, held_out, seed) if isinstance(held_out, int) else list(held_out)
        kept_back = {prompt.text for prompt in self.held_out}
        self._corpora = [[prompt for prompt in prompts if prompt.text not in kept_back] for prompts, _ in corpora]
        _check([(prompts, 1) for prompts in self._corpora])
        lengths = (len(prompts) * repeat for prompts, (_, repeat) in zip(self._corpora, corpora, strict=True))
        *self._starts, self.epoch_length = itertools.accumulate(lengths, initial=0)

    def batch(self, index: int, batch: int, rank: int = 0, ranks: int = 1) -> list[Prompt]:
        """The prompts of one rank in global batch `index`.

        A global batch is `ranks * batch` consecutive prompts, of which rank 0 has the first `batch`; it may span epochs.
        """
        assert index >= 0 and batch >= 1 and 0 <= rank < ranks, (index, batch, rank, ranks)
        first = (index * ranks + rank) * batch
        return [self._at(position) for position in range(first, first + batch)]

    def _at(self, position: int) -> Prompt:
        """The prompt at a position of the sequence."""
        epoch, place = divmod(position, self.epoch_length)
        entry = int(epoch_order(self.seed, epoch, self.epoch_length)[place])
        corpus = bisect.bisect_right(self._starts, entry) - 1
        prompts = self._corpora[corpus]
        return prompts[(entry - self._starts[corpus]) % len(prompts)]
