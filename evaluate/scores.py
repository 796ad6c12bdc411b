"""What judges and probes have found, kept per encoder, task and metric so that nothing is measured twice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.disk import replace_file, sha256
from ..runtime.ranks import Ranks


class Kept:
    """Numbers by name in a folder, each with what decided it and the code that computed it; what other code, models or judges found is
    not found here."""

    def __init__(self, folder: Path, code: str = "") -> None:
        self.folder, self._code = folder, code

    def get(self, name: str, decided_by: Mapping[str, Any]) -> Any:
        """What was kept under a name; None if there is nothing, or something that another judge said."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["decided_by"] == json.loads(json.dumps(decided_by)) and content.get("code") == self._code
        return content["found"] if same else None

    def put(self, name: str, decided_by: Mapping[str, Any], found: Any) -> None:
        """Keep it, whole or not at all."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"decided_by": decided_by, "code": self._code, "found": found}
        replace_file(path, json.dumps(content, indent=1, allow_nan=False).encode())

    def remove(self, name: str) -> None:
        """Keep it no longer."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def get_array(self, name: str, decided_by: Mapping[str, Any]) -> np.ndarray | None:
        """An array that was kept under a name, if it is whole and was decided by the same."""
        path, digest = self.folder / f"{name}.npy", self.get(name, decided_by)
        if digest is None or not path.is_file() or sha256(path) != digest:
            return None
        return np.load(path)

    def put_array(self, name: str, decided_by: Mapping[str, Any], array: np.ndarray) -> None:
        """Keep an array in a file of its own, then the digest that vouches for it."""
        content = io.BytesIO()
        np.save(content, array)
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
        self.put(name, decided_by, sha256(path))


@dataclass(frozen=True)
class Part:
    """What was done of something that is kept as a whole, by place, when a signal stopped the work on it."""

    kept: Kept
    name: str
    decided_by: Mapping[str, Any]

    @property
    def _own_name(self) -> str:
        return f"{self.name}.part"

    def cut_by(self, **how: Any) -> Part:
        """The same, if its places also depend on something that the whole does not depend on."""
        return replace(self, decided_by={**self.decided_by, **how})

    def read(self) -> dict[int, Any]:
        """What was done, if it was decided by the same."""
        return {int(place): found for place, found in (self.kept.get(self._own_name, self.decided_by) or {}).items()}

    def write(self, done: Mapping[int, Any]) -> None:
        """Keep it for the next time."""
        self.kept.put(self._own_name, self.decided_by, done)

    def drop(self) -> None:
        """Remove it, since the whole is kept."""
        self.kept.remove(self._own_name)


def kept_or_made(kept: Kept, ranks: Ranks, name: str, decided_by: Mapping[str, Any], make: Callable[[Part], Any]) -> Any:
    """What is kept under the name, else what `make` gives on every process, which rank 0 keeps. Rank 0 looks, so that all do the same.

    `make` is given the part that an earlier call got done before a signal stopped it.
    """
    found = ranks.share(kept.get(name, decided_by) if ranks.is_main else None)
    if found is None:
        part = Part(kept, name, decided_by)
        found = make(part)
        if ranks.is_main:
            kept.put(name, decided_by, found)
            part.drop()
    return found
