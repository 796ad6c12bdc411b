"""The folder of a run's teacher in `teacher.cache`: named by all that decides its texts, so that those of no other teacher are taken."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfyui_version
import torch
from tqdm import tqdm

from ..encoder.text_shards import TextShards
from ..families.family import Family
from ..prompts.negatives import NEGATIVES
from ..runtime.disk import sync_file, unfinished
from ..runtime.errors import UserError, printable
from .inputs import model_digests
from .recipe import STAND_IN, Recipe

# Of what is written; another number is another folder.
VERSION = "1"
ABOUT = "about.json"
OF_A_TEACHER = re.compile(r"[0-9a-f]{16}")
# Their tokens tell tokenizers of one vocabulary apart.
PROBES = (*NEGATIVES, '  Two  SPACES, a line\nand "quotes" (3.5:1) \u4f60\u597d na\u00efve ')


def description(recipe: Recipe) -> dict[str, str]:
    """What decides the teacher's texts, in words."""
    files = {"teacher.t5": STAND_IN} | model_digests(recipe.each[0], "teacher.")
    flags = sorted(name for name, value in vars(comfy.cli_args.args).items() if name.endswith("text_enc") and value)
    return {
        "version": VERSION,
        "family": recipe.family.name,
        **files,
        "tokenizers": _tokenizers_digest(recipe.family),
        "format": recipe.teacher.cache_format,
        "ComfyUI's flags": " ".join(flags) or "none",
    }


def _tokenizers_digest(family: Family) -> str:
    tokenizers, digest = family.text_classes()[0](), hashlib.sha256()
    digest.update(getattr(tokenizers, "llama_template", "").encode())
    for part in (family.tokenizer_part or family.part, *family.companions):
        tokenizer = getattr(tokenizers, part).tokenizer
        digest.update(repr((sorted(tokenizer.get_vocab().items()), [tokenizer(text)["input_ids"] for text in PROBES])).encode())
    return f"SHA-256 {digest.hexdigest()[:16]}"


def teachers_shards(recipe: Recipe, described: Mapping[str, str]) -> TextShards:
    """The folder of this teacher in `teacher.cache`. Raises UserError for a folder that holds something else."""
    root = Path(recipe.teacher.cache).expanduser().absolute()
    names = [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    if (names and not any(map(OF_A_TEACHER.fullmatch, names))) or root.is_file():
        what = f"holds other files: {', '.join(printable(name) for name in sorted(names)[:5])}" if names else "is a file"
        raise UserError(
            f"teacher.cache: {root} {what}; expected a folder of teacher's texts.", "name an empty folder, or one that does not exist yet."
        )
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return TextShards(root / name, name)


def write_about(folder: Path, described: Mapping[str, str]) -> None:
    """Describe the teacher beside its texts, and with what the first of them were made."""
    if not _read_about(about := folder / ABOUT):
        with unfinished(about) as aside:
            aside.write_text(json.dumps({**described, **_made_with()}, indent=1), encoding="utf-8")
            sync_file(aside)
            os.replace(aside, about)


def _made_with() -> dict[str, str]:
    """What may decide the last bits besides the teacher: with another of it, texts are taken as they are."""
    device = comfy.model_management.text_encoder_device()
    return {"ComfyUI": comfyui_version.__version__, "torch": torch.__version__, "device": device.type}


def _read_about(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def made_otherwise(folder: Path) -> str:
    """With which other versions or device the texts of a folder were made; empty if with the same."""
    there, here = _read_about(folder / ABOUT), _made_with()
    other = {name: there[name] for name in here if there.get(name, here[name]) != here[name]}
    return "; ".join(f"{name} {printable(str(value))}, now {here[name]}" for name, value in other.items())


def other_teachers(folder: Path, described: Mapping[str, str]) -> list[str]:
    """In what the other teachers of the folder differ: whoever expects no work may have changed something."""
    lines = []
    for about in sorted({*folder.parent.glob(f"*/{ABOUT}")} - {folder / ABOUT}):
        other = _read_about(about)
        different = [f"{name} {printable(str(other.get(name, 'none')))}" for name in described if described[name] != other.get(name)]
        more = [f"{name} {printable(str(other[name]))}" for name in sorted(other.keys() - described.keys()) if name.startswith("teacher.")]
        lines.append(f"{about.parent.name}, in the same folder, has the texts of another teacher: {'; '.join(different + more)}.")
    return lines


def tell(line: str) -> None:
    """Write a line to the terminal: before the first step there is no log."""
    tqdm.write(line, file=sys.stderr)
