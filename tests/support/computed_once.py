"""What tests would compute again with the same result: here once in a process."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase


def read_tokenizers_once(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give every text encoder the same tokenizer of a file below `folder`: reading one takes a third of a second."""
    read: Callable[..., Any] = PreTrainedTokenizerBase.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]
    known: dict[Any, Any] = {}

    def once(kind: Any, name: Any, *more: Any, **options: Any) -> Any:
        if more or options or not Path(name).is_relative_to(folder):
            return read(kind, name, *more, **options)
        if (kind, name) not in known:
            known[kind, name] = read(kind, name)
        return known[kind, name]

    patch.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(once))


def rehearse_once(patch: pytest.MonkeyPatch) -> None:
    """Rehearse equal recipes once: a rehearsal takes a second, and most runs of tests differ in their folders alone.

    `__wrapped__` of the new function is the trainer's.
    """
    from comfy.cli_args import args

    from ...train import rehearsal

    rehearse, known = rehearsal.rehearse, {}

    @functools.wraps(rehearse)
    def once(recipe: Any, target: Any, processes: int = 1, with_time: bool = False) -> Any:
        key = (without_folders(recipe.to_toml()), target, processes, with_time, str(vars(args)))
        if key not in known:
            known[key] = rehearse(recipe, target, processes, with_time)
        return copy.deepcopy(known[key])

    patch.setattr(rehearsal, "rehearse", once)


def without_folders(toml: str) -> str:
    """A recipe without what does not change its rehearsal: the seed, and folders. Files count by path, size and time of change."""
    from ...train.unloaded import found

    def shown(match: re.Match[str]) -> str:
        name = match[1]
        for path in (found(name, folder) for folder in ("diffusion_models", "text_encoders")):
            if path is not None and path.is_file():
                return f'"{path}, {path.stat().st_size} bytes, {path.stat().st_mtime_ns}"'
        return f'"{Path(name).name}"' if Path(name).is_absolute() else match[0]

    return re.sub(r'"(/[^"]*|[^"\n]*\.(?:safetensors|sft))"', shown, re.sub(r"(?m)^seed = .*\n", "", toml))
