"""T5 v1.1 and flan-T5 as Hugging Face publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config

from ...runtime.errors import StudentFileError
from ...runtime.weights import check_finite
from ..foreign import refuse_foreign
from ..pretrained import DOWNLOAD, Published
from . import T5
from .layout import SHARED, StudentLayout
from .names import published_names
from .relatives import refuse_relatives

TOKEN_TABLE, TOKEN_TABLE_TWIN = "shared.weight", "encoder.embed_tokens.weight"
OTHER_T5 = "name the T5 v1.1 or flan-T5 of the same size in student.start, or change student.size (or student.layout)."
PUBLISHED = Published("T5", SHARED, ("decoder.", "lm_head."), "T5EncoderModel", OTHER_T5)


def read_pretrained(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    """The encoder of a T5 by published name, float32, from a Hugging Face folder or one file; its decoder and head are ignored.

    Raises ValueError that lists what is missing, unexpected or misshapen, in the shards, in config.json and compared with the layout.
    """
    # Tensors alone do not tell the activation or the bias's range.
    PUBLISHED.check_config(path, layout, _config(layout), T5Config().to_dict())
    loaded = PUBLISHED.read(path)
    if TOKEN_TABLE not in loaded and TOKEN_TABLE_TWIN in loaded:
        loaded[TOKEN_TABLE] = loaded[TOKEN_TABLE_TWIN]
    names, twin = published_names(loaded)
    tensors = {name: loaded[source] for name, source in names.items()}
    _check_kind(tensors, path.name)
    PUBLISHED.check_fit(tensors, layout, path.name)
    if twin is not None and not torch.equal(loaded[twin], tensors[SHARED]):
        raise ValueError(f"{path.name} holds two token tables that differ ({names[SHARED]} and {twin}).\nWhat to do: {DOWNLOAD}")
    check_finite(tensors, path.name)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _config(layout: StudentLayout) -> dict[str, Any]:
    """What config.json says about a T5 of this layout that ComfyUI and transformers compute alike."""
    sizes = {name: getattr(layout, name) for name in ("d_model", "d_ff", "num_layers", "num_heads", "d_kv", "vocab_size")}
    fixed = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    return {"model_type": "t5"} | sizes | {"feed_forward_proj": "gated-gelu" if layout.gated else "relu"} | fixed


def _check_kind(tensors: Mapping[str, Tensor], where: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        refuse_foreign(shapes, where, T5)
        refuse_relatives(shapes, where, described=True)
    except StudentFileError as error:
        raise ValueError(
            f"{error.problem}\nA student starts from a T5 v1.1, a flan-T5 or a distilled T5.\nWhat to do: {OTHER_T5}"
        ) from error
