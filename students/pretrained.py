"""Networks as Hugging Face publishes them: one safetensors file, or shards with an index. Incomplete ones are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import listed, printable
from ..runtime.weights import load_tensors, read_header
from .projection import PROJECTION

if TYPE_CHECKING:
    from torch import Tensor

    from .kind import Layout, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
DOWNLOAD = "download the folder again, with every file of the repository."


@dataclass(frozen=True)
class Published:
    """How a kind's networks are published: what people call it, its token table, the beginnings of names that are not read, transformers'
    class that converts other formats, and what to do about another network."""

    name: str
    table: str
    ignored: tuple[str, ...]
    model_class: str
    other: str

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a folder or a file, by their names in it. Raises ValueError that lists what is missing."""
        return self._folder(path) if path.is_dir() else self._file(path)

    def _file(self, path: Path) -> dict[str, Tensor]:
        return load_tensors(path, [name for name in read_header(path)[0] if not name.startswith(self.ignored)])

    def _folder(self, folder: Path) -> dict[str, Tensor]:
        if (folder / WEIGHTS).is_file():
            return self._file(folder / WEIGHTS)
        if (folder / INDEX).is_file():
            return self._sharded(folder / INDEX)
        found = sorted(path.name for path in folder.iterdir())
        convert = (
            "let transformers write safetensors files, and name the new folder: "
            f'python -c "from transformers import {self.model_class} as T; '
            f"T.from_pretrained(r'{folder}').save_pretrained(r'{folder}-safetensors')\""
        )
        raise ValueError(
            f"{folder} holds no weights that are read here: expected {WEIGHTS}, or shards with {INDEX}.\n"
            f"It holds {printable(', '.join(found[:12])) or 'nothing'}.\n"
            f"What to do: {convert if any(name.endswith('.bin') for name in found) else DOWNLOAD}"
        )

    def _sharded(self, index: Path) -> dict[str, Tensor]:
        """The tensors of all shards, which must be exactly those of the index."""
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
            tensors |= self._file(index.parent / shard)
        if problems:
            raise ValueError(
                f"{index.name} does not match its shards: {len(problems)} tensors differ.\n{listed(problems)}\nWhat to do: {DOWNLOAD}"
            )
        return tensors

    def check_config(self, folder: Path, layout: Layout, expected: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Compare a folder's config.json, if it has one, with what is expected: tensors alone do not tell everything.

        `defaults` stands for keys that the file leaves out.
        """
        path = folder / CONFIG
        if not path.is_file():
            return
        config = _json(path)
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a model configuration.\nWhat to do: {DOWNLOAD}")
        # transformers 5 writes what concerns rotary embeddings into a table of its own.
        found = {**defaults, **config, **(config.get("rope_parameters") or {})}
        differences = [f"{key}: expected {value}, got {found.get(key)}" for key, value in expected.items() if found.get(key) != value]
        if differences:
            raise ValueError(
                f"{path.parent.name} is not a {layout.size_name}, the recipe's student, according to its {CONFIG}.\n{listed(differences)}\n"
                f"What to do: {self.other}"
            )

    def check_fit(self, tensors: Mapping[str, Tensor], layout: Layout, where: str) -> None:
        """Raise ValueError unless the tensors are those of the layout without its projection."""
        wanted = {name: shape for name, shape in layout.tensors().items() if not name.startswith(PROJECTION)}
        width, expected = (shapes[self.table][-1] if self.table in shapes else None for shapes in (_shapes(tensors), wanted))
        if width not in (None, expected):
            raise ValueError(
                f"{where} is a {self.name} of width {width}; the recipe's student ({layout.size_name}) has width {expected}.\n"
                f"What to do: {self.other} Were teacher.t5 and student.start swapped?"
            )
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
                f"What to do: {self.other}"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
