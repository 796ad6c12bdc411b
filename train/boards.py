"""Where a run's numbers and images also go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image


class Board(Protocol):
    """Receives what the run reports. OSError ends it and not the run; any other exception stops the run, whose state is not saved."""

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """The numbers of a step ("train") or of a validation ("validation") by name; some are nested by name once."""

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """An image that the run has made."""

    def close(self) -> None:
        """The run has ended."""
