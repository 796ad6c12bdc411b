"""What decides the result of a run besides its recipe, as digests of contents: prompts and model files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..runtime.comfyui import model_file
from ..runtime.disk import sha256
from ..runtime.errors import StudentFileError, UserError
from ..runtime.header import read_entries
from .batches import Schedule
from .preflight import models_of
from .recipe import Recipe
from .run_directory import ANOTHER

# The bytes of each tensor that are read, from its middle. Another model, a fine-tune or a merge changes every tensor that it trained.
SAMPLED_BYTES = 65_536
DIGITS = 16


def inputs_of(recipe: Recipe, schedule: Schedule) -> dict[str, str]:
    """Digests by name: of every stage's prompts, of the held-out prompts, of every model file that decides the result."""
    return schedule.digests | model_digests(recipe, "diffusion_model.", "teacher.", "student.")


def model_digests(recipe: Recipe, *parts: str) -> dict[str, str]:
    """Digests by name of the model files of these parts of the recipe."""
    models = [model for model in models_of(recipe) if model.key.startswith(parts)]
    return {model.key: _digest_of(model_file(model.name, model.folder)) for model in models}


def refuse_other_inputs(recorded: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Raise UserError that lists the inputs that differ from those recorded in the run's newest checkpoint."""
    different = {name: digest for name, digest in recorded.items() if present.get(name, digest) != digest}
    if different:
        raise UserError(
            "The run was started with other inputs than it would be resumed with.",
            f"put the earlier files and prompts back, or, for a new run, {ANOTHER}.",
            "\n".join(f"  {name}: expected {digest}, got {present[name]}" for name, digest in different.items()),
        )


def _digest_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return "; ".join(weights_digest(file) for file in files)


def weights_digest(path: Path) -> str:
    """Size and SHA-256 of a weight file: of its tensors' names, formats and shapes, and 64 KiB from the middle of each tensor.

    Metadata and the order of the tensors do not matter. A file that is not safetensors is read completely.
    """
    try:
        entries = read_entries(path)
    except StudentFileError:
        return f"{path.stat().st_size:,} bytes, SHA-256 {sha256(path)[:DIGITS]}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, entry in sorted(entries.items()):
            file.seek(entry.begin + max(0, entry.size - SAMPLED_BYTES) // 2)
            digest.update(repr((name, entry.dtype, entry.shape)).encode(errors="surrogatepass"))
            digest.update(file.read(min(entry.size, SAMPLED_BYTES)))
    return f"{sum(entry.size for entry in entries.values()):,} bytes of tensors, SHA-256 {digest.hexdigest()[:DIGITS]}"
