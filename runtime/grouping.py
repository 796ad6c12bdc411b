"""What can be computed together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """The places of equal keys, in the order in which the keys first occur."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
