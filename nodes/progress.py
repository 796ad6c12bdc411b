"""Progress of a node in the graph."""

from __future__ import annotations

import comfy.model_management
import comfy.utils

from ..runtime.progress import Progress


def progress_bar() -> Progress:
    """Progress that moves the node's bar, and raises when the user cancels."""
    bars: list[comfy.utils.ProgressBar] = []

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return show
