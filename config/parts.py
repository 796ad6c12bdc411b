"""What the typed parts of recipes and suites are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _file_stem(name: str) -> str:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or name[0] in ".-" or name.endswith((".", ".safetensors", ".toml")):
        raise ValueError("expected a file name of letters, digits, '_', '-' and '.', without folder and ending")
    return name


def _frozen(entries: Any) -> Any:
    return tuple(entries) if isinstance(entries, list) else entries


def _not_empty(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("expected at least one entry")
    return entries


Text = Annotated[str, Field(min_length=1)]


FileStem = Annotated[Text, AfterValidator(_file_stem)]


FROM_LIST = BeforeValidator(_frozen)


NOT_EMPTY = AfterValidator(_not_empty)


Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A part of a recipe: nothing unknown in it, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
