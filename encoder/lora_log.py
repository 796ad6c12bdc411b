"""One log line instead of hundreds when a LoRA has weights for the large encoder, which a student cannot use.

ComfyUI logs every key of a LoRA that fits no weight. A Flux LoRA trained together with T5-XXL has hundreds of them; its other keys are
applied. ComfyUI's loader has no other hook than the log.
"""

from __future__ import annotations

import logging
import re
import time
import weakref
from typing import TYPE_CHECKING

from ..students.kind import StudentKind

if TYPE_CHECKING:
    from torch import nn

COMFYUI_LINE = "lora key not loaded: "
NOTICE = "This LoRA has weights for a {large} text encoder, which a distilled {kind} cannot use: they are ignored."
# Lines of one LoRA come within milliseconds of each other.
SAME_LORA_S = 2.0


class FoldLoraLines(logging.Filter):
    """Passes the first line of each LoRA for an encoder that students of a kind replace, reworded, and drops the rest."""

    def __init__(self, kind: StudentKind, large: str) -> None:
        super().__init__()
        self.notice, self._keys = NOTICE.format(large=large, kind=kind.display_name), re.compile(kind.lora_keys)
        self._models = 0
        self._end_lora()

    def follow(self, model: nn.Module) -> None:
        """Stay on the root logger for as long as this text model or another one lives."""
        self._models += 1
        logging.getLogger().addFilter(self)
        # Before ComfyUI loads a LoRA, it asks for the names of the model's weights.
        model.register_state_dict_pre_hook(lambda *_: self._end_lora())
        weakref.finalize(model, self._leave).atexit = False

    def _leave(self) -> None:
        self._models -= 1
        if not self._models:
            logging.getLogger().removeFilter(self)

    def _end_lora(self) -> None:
        self._last_s = float("-inf")
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.msg if isinstance(record.msg, str) else ""
        if not message.startswith(COMFYUI_LINE) or not self._keys.match(message, len(COMFYUI_LINE)):
            return True
        now_s = time.monotonic()
        begins = message in self._seen or now_s - self._last_s > SAME_LORA_S
        if begins:
            self._end_lora()
        self._seen.add(message)
        self._last_s = now_s
        if begins:
            record.msg = self.notice
            record.args = ()
        return begins


def fold_lora_lines(model: nn.Module, kind: StudentKind, large: str) -> None:
    """Keep one filter per large encoder on the root logger, where ComfyUI writes, for as long as this text model lives."""
    new = FoldLoraLines(kind, large)
    filters = (each for each in logging.getLogger().filters if isinstance(each, FoldLoraLines))
    next((each for each in filters if each.notice == new.notice), new).follow(model)
