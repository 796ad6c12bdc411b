"""Networks of others, from files and folders on this machine only: never from a hub, never with a tensor left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.errors import listed, printable
from ..runtime.weights import load_tensors

CONFIG, TOKENIZERS = "config.json", ("tokenizer.json", "vocab.json", "vocab.txt")
FETCH = "fetch it whole, and give the path to where it lies"


def load_file(path: Path, what: str, source: str) -> dict[str, Tensor]:
    """A safetensors file's tensors by name. Raises ValueError that says where the file can be found, or how to convert it."""
    if not path.is_file():
        raise ValueError(f"{what} needs its weights, and there is no file {path}.\nWhat to do: {FETCH}: {source}")
    return load_tensors(path)


def frozen(module: Any, device: str) -> Any:
    """The module on its device, without dropout and without gradients."""
    return module.train(False).requires_grad_(False).to(device)


def load_folder(model_class: Any, folder: Path, what: str, source: str) -> Any:
    """A transformers model from a Hugging Face folder on this machine, whole, float32, on the CPU. Raises ValueError if it is not."""
    _check_folder(folder, what, source)
    try:
        model, found = model_class.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:  # transformers raises each of them for a file that is missing or damaged
        said = printable(str(error).strip().partition("\n")[0], 400)
        raise ValueError(f"{folder} could not be loaded for {what}.\ntransformers says: {said}\nWhat to do: {FETCH}: {source}") from error
    problems = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    problems += [f"{name}: found {list(there)}, expected {list(wanted)}" for name, there, wanted in found["mismatched_keys"]]
    if problems:
        raise ValueError(
            f"{folder} does not hold a whole {model_class.__name__}: {len(problems)} tensors differ.\n{listed(problems, 20)}\n"
            f"What to do: {FETCH}: {source}"
        )
    return model.float()


def load_processor(processor_class: Any, folder: Path, what: str, source: str, reads_text: bool = False) -> Any:
    """What prepares the inputs of a model in the same folder: an image processor, with a tokenizer if it reads text."""
    _check_folder(folder, what, source)
    if reads_text and not any((folder / name).is_file() for name in TOKENIZERS):
        # transformers would go on with a tokenizer that knows no word.
        raise ValueError(f"{folder} lacks its tokenizer: expected {' or '.join(TOKENIZERS)}.\nWhat to do: {FETCH}: {source}")
    try:
        return processor_class.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        said = printable(str(error).strip().partition("\n")[0], 400)
        raise ValueError(
            f"{folder} lacks files that {what} needs beside the weights.\ntransformers says: {said}\nWhat to do: {FETCH}: {source}"
        ) from error


def _check_folder(folder: Path, what: str, source: str) -> None:
    if not (folder / CONFIG).is_file():
        came = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{what} reads a Hugging Face folder, and was given {folder}: {came}.\nWhat to do: {FETCH}: {source}")
