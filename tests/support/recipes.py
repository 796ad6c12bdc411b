"""Recipes of a test's own, and what is said of those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...config.files import SHIPPED, ConfigError
from ...train.recipe import Recipe, load_recipe

SMOKE = (SHIPPED / "smoke.toml").read_text(encoding="utf-8")


def recipe_of(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8", newline="\n")
    return load_recipe(str(path), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error about a recipe's text, between its head and its remedy."""
    with pytest.raises(ConfigError) as caught:
        recipe_of(folder, text, *overrides)
    head, *details, remedy = str(caught.value).splitlines()
    assert "mine.toml" in head
    assert remedy.startswith("What to do: ")
    assert [line.strip() for line in details] == caught.value.problems
    return caught.value.problems
