"""What the typed parts of recipes and suites are made of."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from .toml import write_toml


def file_stem(name: str) -> str:
    """The name if it can be that of a file, without its extension. Raises ValueError that says what is expected."""
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or name[0] in ".-" or name.endswith((".", ".safetensors", ".toml")):
        raise ValueError("expected a file name of letters, digits, '_', '-' and '.', without folder and extension")
    return name


def _path(name: str) -> str:
    if any(character < " " for character in name):
        raise ValueError("a backslash in double quotes starts an escape: write the path in single quotes or with forward slashes")
    return name


def _frozen(entries: Any) -> Any:
    return tuple(entries) if isinstance(entries, list) else entries


def _not_empty(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("expected at least one entry")
    return entries


Text = Annotated[str, Field(min_length=1)]
FileStem = Annotated[Text, AfterValidator(file_stem)]
# A path or the name of a file. In TOML, "D:\t5\new" holds a tab and a line break.
FilePath = Annotated[Text, AfterValidator(_path)]
OptionalPath = Annotated[str, AfterValidator(_path)]
FROM_LIST = BeforeValidator(_frozen)
NOT_EMPTY = AfterValidator(_not_empty)
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A part of a recipe or suite: unknown keys are errors, values are not converted, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Config(Part):
    """A complete recipe or suite."""

    def to_toml(self) -> str:
        """The canonical text: equal objects give equal text, and reading the text gives an equal object."""
        return write_toml(self.model_dump(by_alias=True, exclude_none=True))

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical text in UTF-8."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()
