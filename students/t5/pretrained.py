"""T5 v1.1 and flan-T5 as Hugging Face publishes them: one safetensors file, or shards with an index. Incomplete ones are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config

from ...runtime.errors import StudentFileError, listed, printable
from ...runtime.weights import check_finite, load_tensors, read_header
from ..foreign import refuse_foreign
from . import T5
from .layout import SHARED, StudentLayout
from .names import published_names
from .relatives import refuse_relatives

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
TOKEN_TABLE, TOKEN_TABLE_TWIN = "shared.weight", "encoder.embed_tokens.weight"
OTHER_PARTS = ("decoder.", "lm_head.")
OTHER_T5 = "name the T5 v1.1 or flan-T5 of the same size in student.start, or change student.size (or student.layout)."
DOWNLOAD = "download the folder again, with every file of the repository."


def read_pretrained(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    """The encoder of a T5 by published name, float32, from a Hugging Face folder or one file; its decoder and head are ignored.

    Raises ValueError that lists what is missing, unexpected or misshapen, in the shards, in config.json and compared with the layout.
    """
    if path.is_dir():
        _check_config(path / CONFIG, layout)
    loaded = _folder(path) if path.is_dir() else _encoder(path)
    if TOKEN_TABLE not in loaded and TOKEN_TABLE_TWIN in loaded:
        loaded[TOKEN_TABLE] = loaded[TOKEN_TABLE_TWIN]
    names, twin = published_names(loaded)
    tensors = {name: loaded[source] for name, source in names.items()}
    _check_kind(tensors, path.name)
    _check_fit(tensors, layout, path.name)
    if twin is not None and not torch.equal(loaded[twin], tensors[SHARED]):
        raise ValueError(f"{path.name} holds two token tables that differ ({names[SHARED]} and {twin}).\nWhat to do: {DOWNLOAD}")
    check_finite(tensors, path.name)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _encoder(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that are not the decoder's or the head's, by name in the file."""
    return load_tensors(path, [name for name in read_header(path)[0] if not name.startswith(OTHER_PARTS)])


def _folder(folder: Path) -> dict[str, Tensor]:
    """The encoder of a folder's weights, by name in them."""
    if (folder / WEIGHTS).is_file():
        return _encoder(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _sharded(folder / INDEX)
    found = sorted(path.name for path in folder.iterdir())
    convert = (
        "let transformers write safetensors files, and name the new folder: "
        f'python -c "from transformers import T5EncoderModel as T; '
        f"T.from_pretrained(r'{folder}').save_pretrained(r'{folder}-safetensors')\""
    )
    raise ValueError(
        f"{folder} holds no weights that are read here: expected {WEIGHTS}, or shards with {INDEX}.\n"
        f"It holds {printable(', '.join(found[:12])) or 'nothing'}.\n"
        f"What to do: {convert if any(name.endswith('.bin') for name in found) else DOWNLOAD}"
    )


def _sharded(index: Path) -> dict[str, Tensor]:
    """The encoder of all shards, whose tensors must be exactly those of the index."""
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(shards)} shards that {index.name} names are not in {index.parent}.\n{listed(missing)}\n"
            f"What to do: {DOWNLOAD}"
        )
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for shard in shards:
        held = read_header(index.parent / shard)[0]
        named = [name for name, place in shard_of.items() if place == shard]
        problems += [f"{name}: expected in {shard}, missing" for name in named if name not in held]
        problems += [f"{name}: in {shard}, unknown to the index" for name in held if shard_of.get(name) != shard]
        tensors |= _encoder(index.parent / shard)
    if problems:
        raise ValueError(
            f"{index.name} does not match its shards: {len(problems)} tensors differ.\n{listed(problems)}\nWhat to do: {DOWNLOAD}"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to the shard that holds it."""
    content = _json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    plain = isinstance(shard_of, dict) and all(isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values())
    if not shard_of or not plain:
        raise ValueError(
            f"{index.name} is not an index of shards: expected a weight_map of tensor names to files beside it.\nWhat to do: {DOWNLOAD}"
        )
    return shard_of


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} in {path.parent} is not JSON: {printable(str(error))}\nWhat to do: {DOWNLOAD}") from error


def _check_config(path: Path, layout: StudentLayout) -> None:
    """Compare a folder's config.json, if it has one, with the layout: tensors alone do not tell the activation or the bias's range."""
    if not path.is_file():
        return
    config = _json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model configuration.\nWhat to do: {DOWNLOAD}")
    found = T5Config().to_dict() | config
    differences = [f"{key}: expected {value}, got {found.get(key)}" for key, value in _config(layout).items() if found.get(key) != value]
    if differences:
        raise ValueError(
            f"{path.parent.name} is not a {layout.size_name}, the recipe's student, according to its {CONFIG}.\n{listed(differences)}\n"
            f"What to do: {OTHER_T5}"
        )


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


def _check_fit(tensors: Mapping[str, Tensor], layout: StudentLayout, where: str) -> None:
    width = tensors[SHARED].shape[-1] if SHARED in tensors else layout.d_model
    if width != layout.d_model:
        raise ValueError(
            f"{where} is a T5 of width {width}; the recipe's student ({layout.size_name}) has width {layout.d_model}.\n"
            f"What to do: {OTHER_T5} Were teacher.t5 and student.start swapped?"
        )
    wanted = {name: shape for name, shape in layout.tensors().items() if not name.startswith("final_projection.")}
    problems = [f"{name}: missing" for name in wanted if name not in tensors]
    problems += [f"{name}: unexpected" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else shape
        if found != shape:
            problems.append(f"{name}: expected {list(shape)}, got {list(found)}")
    problems += [f"{name}: not floating point" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if problems:
        raise ValueError(
            f"{where} does not fit the recipe's student ({layout.size_name}): {len(problems)} tensors differ.\n{listed(problems)}\n"
            f"What to do: {OTHER_T5}"
        )
