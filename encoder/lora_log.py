"""One log line instead of hundreds when a LoRA has weights for T5-XXL, which a distilled T5 cannot use.

ComfyUI logs every key of a LoRA that fits no weight. A Flux LoRA trained together with T5-XXL has hundreds of them; its other keys are
applied. ComfyUI's loader has no other hook than the log.
"""

from __future__ import annotations

import logging
import re
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

COMFYUI_LINE = "lora key not loaded: "
# kohya and OneTrainer (lora_te2_, lora_te3_), LyCORIS (lycoris_te2_), ComfyUI's generic names (text_encoders.t5xxl.), diffusers
# (text_encoder_2.), PEFT (base_model.model.) and bare names (te2., t5.): all for the T5 encoder of Flux or SD3.
T5XXL_KEY = re.compile(
    r"(base_model\.model\.)?((lora|lycoris)[._])?"
    r"((text_encoders\.)?t5(_?xxl)?[._]"
    r"|(te|text_encoders?)(_?\d)?[._](transformer[._])?(encoder[._](block|final_layer_norm|embed_tokens)|shared)[._])"
)
NOTICE = "This LoRA has weights for a T5-XXL text encoder, which a distilled T5 cannot use: they are ignored."
# Lines of one LoRA come within milliseconds of each other.
SAME_LORA_S = 2.0


class FoldT5xxlLines(logging.Filter):
    """Passes the first line of each LoRA, reworded, and drops the rest."""

    def __init__(self) -> None:
        super().__init__()
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
        if not message.startswith(COMFYUI_LINE) or not T5XXL_KEY.match(message, len(COMFYUI_LINE)):
            return True
        now_s = time.monotonic()
        begins = message in self._seen or now_s - self._last_s > SAME_LORA_S
        if begins:
            self._end_lora()
        self._seen.add(message)
        self._last_s = now_s
        if begins:
            record.msg = NOTICE
            record.args = ()
        return begins


def fold_t5xxl_lora_lines(model: nn.Module) -> None:
    """Keep one filter on the root logger, where ComfyUI writes, for as long as this text model lives."""
    present = (each for each in logging.getLogger().filters if isinstance(each, FoldT5xxlLines))
    next(present, FoldT5xxlLines()).follow(model)
