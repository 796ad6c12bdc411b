"""The students of a recipe: `[student]`, or several `[[student]]`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from ..config.files import ONE_OF
from ..config.parts import Count, FilePath, FileStem, Part
from ..students import KINDS
from ..students.kind import StudentKind

TABLES = {f"{ONE_OF}{kind.name}": kind.layout_table() for kind in KINDS.values()}


def _table_of(value: Any) -> str:
    """The tag of the kind whose table has most of the keys that are given."""
    keys = set(value if isinstance(value, Mapping) else getattr(value, "model_fields_set", ()))
    return max(TABLES, key=lambda tag: len(keys & set(TABLES[tag].model_fields)))


# The table of any kind of student.
if TYPE_CHECKING:
    LayoutTable: TypeAlias = Part
else:
    AnyTable = functools.reduce(operator.or_, (Annotated[table, Tag(tag)] for tag, table in TABLES.items()))
    LayoutTable = Annotated[AnyTable, Discriminator(_table_of)]


def one_of(name: str, names: Iterable[str]) -> str:
    """The name, if it is one of these. Raises ValueError that lists them."""
    if name not in names:
        raise ValueError(f"expected one of {', '.join(names)}")
    return name


StudentSize = Annotated[str, AfterValidator(lambda name: one_of(name, [size for kind in KINDS.values() for size in kind.sizes]))]


class StudentPart(Part):
    """A text encoder that is trained. Exactly one of `size` and `layout` must be given."""

    name: FileStem | None = Field(default=None, description="of several, each a [[student]]: its name, added to output.name")
    size: StudentSize | None = Field(default=None, description="a published size of the network, such as base")
    layout: LayoutTable | None = Field(default=None, description="any other size")
    start: FilePath = Field(
        description="initial weights: a pretrained model (T5 v1.1, flan-T5 or Qwen3; Hugging Face folder or .safetensors) or a distilled "
        'file, in models/text_encoders or by path; or "random"'
    )
    trunk: Literal["whole", "frozen"] = Field(
        default="whole", description="whether the network below the projection is trained, or stays as it starts (frozen)"
    )
    projection_width: Count = Field(description="hidden width of the projection to the diffusion model's text width, channels")
    dropout: float = Field(ge=0, lt=1, description="fraction of activations dropped in training, 0 or more and below 1")

    @model_validator(mode="after")
    def _one_size(self) -> StudentPart:
        if (self.size is None) == (self.layout is None):
            raise ValueError("expected either size or layout, got " + ("neither" if self.size is None else "both"))
        return self

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the key has the digest that it had before the key existed."""
        return {key: value for key, value in written(self).items() if key != "trunk" or value != "whole"}

    def is_of(self, kind: StudentKind) -> bool:
        """Whether its size or table is one of this kind."""
        return self.size in kind.sizes or isinstance(self.layout, kind.layout_table())


def one_or_several(given: Any, several: Callable[[Any], Any]) -> tuple[StudentPart, ...]:
    """The students of `[student]` or of `[[student]]`, with errors at the key that the file has."""
    return several(tuple(given)) if isinstance(given, list | tuple) else (StudentPart.model_validate(given),)
