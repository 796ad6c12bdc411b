"""Numbers that judges and probes have found, kept by encoder, task and metric so that nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file
from ..runtime.ranks import Ranks

log = logging.getLogger(__name__)


class Kept:
    """Numbers by name in a folder, each with what decided it. Only numbers of the same code, models and judges are found."""

    def __init__(self, folder: Path, code: str = "") -> None:
        self.folder, self._code = folder, code

    def get(self, name: str, decided_by: Mapping[str, Any]) -> Any:
        """What is kept under a name; None if there is nothing, if something else decided it, or if its file is damaged."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            decided, found, digest = content["decided_by"], content["found"], content["sha256"]
        except (ValueError, LookupError, TypeError, RecursionError):
            digest = decided = found = None
        if digest != _digest(decided, found):
            log.warning("%s is damaged or was edited: its numbers are measured again", path)
            return None
        return found if decided == self._decided(decided_by) else None

    def put(self, name: str, decided_by: Mapping[str, Any], found: Any) -> None:
        """Keep it: all of it or, after a kill, nothing."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        decided = self._decided(decided_by)
        content = {"decided_by": decided, "found": found, "sha256": _digest(decided, found)}
        replace_file(path, json.dumps(content, indent=1, allow_nan=False).encode())

    def _decided(self, decided_by: Mapping[str, Any]) -> dict[str, Any]:
        """As it reads back from JSON: tuples are lists there."""
        return json.loads(json.dumps({**decided_by, "code": self._code}))

    def remove(self, name: str) -> None:
        """Keep it no longer."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)


def _digest(decided_by: Any, found: Any) -> str:
    return hashlib.sha256(json.dumps([decided_by, found], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Unfinished:
    """What was done of a kept value, by place, when a signal stopped the work on it."""

    kept: Kept
    name: str
    decided_by: Mapping[str, Any]

    def also_decided_by(self, **more: Any) -> Unfinished:
        """The same, where places also depend on something that the finished value does not depend on."""
        return replace(self, decided_by={**self.decided_by, **more})

    def read(self) -> dict[int, Any]:
        """What was done, if the same decided it."""
        return {int(place): found for place, found in (self.kept.get(f"{self.name}.part", self.decided_by) or {}).items()}

    def write(self, done: Mapping[int, Any]) -> None:
        """Keep it for the next run."""
        self.kept.put(f"{self.name}.part", self.decided_by, {str(place): found for place, found in done.items()})


def kept_or_made(kept: Kept, ranks: Ranks, name: str, decided_by: Mapping[str, Any], make: Callable[[Unfinished], Any]) -> Any:
    """The value kept under the name, else what `make` gives on every process, which rank 0 keeps. Rank 0 looks, so that all agree.

    `make` takes what an earlier call had done when a signal stopped it.
    """
    found = ranks.share(kept.get(name, decided_by) if ranks.is_main else None)
    if found is None:
        found = make(Unfinished(kept, name, decided_by))
        if ranks.is_main:
            kept.put(name, decided_by, found)
            kept.remove(f"{name}.part")
    return found
