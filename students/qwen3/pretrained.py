"""Qwen3 as Hugging Face publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Qwen3Config

from ...runtime.errors import StudentFileError
from ...runtime.weights import check_finite
from ..foreign import refuse_foreign
from ..pretrained import Published
from . import QWEN3
from .layout import EPSILON, HEAD_WIDTH, ROPE_THETA, TOKEN_TABLE, Qwen3Layout
from .names import published_names
from .relatives import refuse_relatives

OTHER_QWEN3 = "name the Qwen3 of the same size in student.start, or change student.size (or student.layout)."
PUBLISHED = Published("Qwen3", TOKEN_TABLE, ("lm_head.",), "Qwen3Model", OTHER_QWEN3)


def read_pretrained(path: Path, layout: Qwen3Layout) -> dict[str, Tensor]:
    """A Qwen3 by distilled name, float32, from a Hugging Face folder or one file; its language model head is ignored.

    Raises ValueError that lists what is missing, unexpected or misshapen, in the shards, in config.json and compared with the layout.
    """
    # Tensors alone do not tell the rotary embedding or the activation.
    PUBLISHED.check_config(path, layout, _config(layout), Qwen3Config().to_dict() | {"rope_type": "default"})
    loaded = PUBLISHED.read(path)
    tensors = {name: loaded[source] for name, source in published_names(loaded)[0].items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        refuse_foreign(shapes, path.name, QWEN3)
        refuse_relatives(shapes, path.name, described=True)
    except StudentFileError as error:
        raise ValueError(f"{error.problem}\nA student starts from a Qwen3 or a distilled Qwen3.\nWhat to do: {OTHER_QWEN3}") from error
    PUBLISHED.check_fit(tensors, layout, path.name)
    check_finite(tensors, path.name)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _config(layout: Qwen3Layout) -> dict[str, Any]:
    """What config.json says about a Qwen3 of this layout that ComfyUI and transformers compute alike."""
    return {
        "model_type": "qwen3",
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": layout.num_heads,
        "num_key_value_heads": layout.num_kv_heads,
        "head_dim": HEAD_WIDTH,
        "vocab_size": layout.vocab_size,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rope_type": "default",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }
