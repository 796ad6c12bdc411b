"""One log line instead of hundreds when a LoRA has weights for T5-XXL, which a distilled T5 cannot use.

ComfyUI logs every key of a LoRA that fits no weight. A Flux LoRA trained together with T5-XXL has hundreds of them; its other keys are
applied. ComfyUI's loader has no other hook than the log.
"""

from __future__ import annotations

import logging
import re
import time

COMFYUI_LINE = "lora key not loaded: "
# kohya and OneTrainer (lora_te2_, lora_te3_), ComfyUI's generic names, diffusers (text_encoder_2): all for the T5 encoder of Flux or SD3.
T5XXL_KEY = re.compile(
    r"(lora_te\d_(encoder_block|shared)_|text_encoders\.t5xxl\.|text_encoder_[23]\.encoder\.block\.|t5xxl\.transformer\.)"
)
NOTICE = "This LoRA has weights for a T5-XXL text encoder, which a distilled T5 cannot use: they are ignored."
# Lines of one LoRA come within milliseconds of each other.
SAME_LORA_S = 2.0


class FoldT5xxlLines(logging.Filter):
    """Passes the first line of each LoRA, reworded, and drops the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._last_s = float("-inf")
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.msg if isinstance(record.msg, str) else ""
        if not message.startswith(COMFYUI_LINE) or not T5XXL_KEY.match(message, len(COMFYUI_LINE)):
            return True
        now_s = time.monotonic()
        begins = message in self._seen or now_s - self._last_s > SAME_LORA_S
        if begins:
            self._seen.clear()
        self._seen.add(message)
        self._last_s = now_s
        if begins:
            record.msg = NOTICE
            record.args = ()
        return begins


def fold_t5xxl_lora_lines() -> None:
    """Put the filter on the root logger, where ComfyUI writes, once per process."""
    root = logging.getLogger()
    if not any(isinstance(present, FoldT5xxlLines) for present in root.filters):
        root.addFilter(FoldT5xxlLines())
