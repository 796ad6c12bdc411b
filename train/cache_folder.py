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

import comfy.cli_args
from tqdm import tqdm

from ..encoder.text_shards import TextShards
from ..families.family import Family
from ..prompts.negatives import NEGATIVES
from ..runtime.disk import unfinished
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
    files = {"teacher.t5": STAND_IN} | model_digests(recipe, "teacher.")
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
    shards = TextShards(root / name, name)
    if not (about := shards.folder / ABOUT).is_file():
        with unfinished(about) as aside:
            aside.write_text(json.dumps(described, indent=1), encoding="utf-8")
            os.replace(aside, about)
    return shards


def tell_others(folder: Path, described: Mapping[str, str]) -> None:
    """Say in what the other teachers of the folder differ: whoever expects no work may have changed something."""
    for about in sorted({*folder.parent.glob(f"*/{ABOUT}")} - {folder / ABOUT}):
        with contextlib.suppress(OSError, ValueError, TypeError):
            other = json.loads(about.read_text(encoding="utf-8"))
            different = [
                f"{name} {printable(str(other.get(name, 'none')))}" for name in described | other if described.get(name) != other.get(name)
            ]
            tell(f"Beside it, {about.parent.name} is of another teacher: {'; '.join(different)}.")


def tell(line: str) -> None:
    """Write a line to the terminal: before the first step there is no log."""
    tqdm.write(line, file=sys.stderr)
