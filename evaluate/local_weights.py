"""Judges' networks from files and folders on this machine: never downloaded, never with a tensor left unset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.errors import listed, printable
from ..runtime.failure import is_out_of_memory
from ..runtime.weights import SAFETENSORS, load_tensors

CONFIG, TOKENIZERS = "config.json", ("tokenizer.json", "vocab.json", "vocab.txt")
FETCH = "What to do: download all of it, and give the path to it:"
# Nothing is downloaded, and no code of a folder is run.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_file(path: Path, what: str, source: str) -> dict[str, Tensor]:
    """A file's tensors by name; only tensors are read of it. Raises ValueError that says where to download the file."""
    if not path.is_file():
        raise ValueError(f"{what} needs its weights: there is no file {path}.\n{FETCH} {source}")
    if path.suffix.lower() in SAFETENSORS:
        return load_tensors(path)
    import comfy.utils

    try:
        content = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is not a valid file of weights: {type(error).__name__}.\n{FETCH} {source}") from error
    if not isinstance(content, dict) or not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} is not a file of named tensors.\n{FETCH} {source}")
    return content


def frozen(module: Any, device: str) -> Any:
    """The module on its device, without dropout and without gradients."""
    # torch documents Module.eval as equal to this. It is written so here and in train/validation.py because the registry's scanner takes
    # that name for Python's function, which the pack does not use.
    return module.train(False).requires_grad_(False).to(device)


def load_folder(model_class: Any, folder: Path, what: str, source: str) -> Any:
    """A transformers model from a Hugging Face folder, complete, float32, on the CPU. Raises ValueError if it is not complete."""
    _check_folder(folder, what, source)
    try:
        model, found = model_class.from_pretrained(str(folder), output_loading_info=True, **LOCAL)
    except Exception as error:  # transformers and torch raise many kinds for a missing or damaged file
        if is_out_of_memory(error):
            raise
        raise _not_loaded(folder, what, source, error) from error
    problems = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    problems += [f"{name}: found {list(there)}, expected {list(wanted)}" for name, there, wanted in found["mismatched_keys"]]
    if problems:
        raise ValueError(
            f"{folder} is not a complete {model_class.__name__}: {len(problems)} tensors differ.\n{listed(problems, 20)}\n{FETCH} {source}"
        )
    return model.float()


def load_processor(processor_class: Any, folder: Path, what: str, source: str, reads_text: bool = False) -> Any:
    """What prepares the inputs of a model in the same folder: an image processor, with a tokenizer if it reads text."""
    _check_folder(folder, what, source)
    if reads_text and not any((folder / name).is_file() for name in TOKENIZERS):
        # transformers would go on with a tokenizer that knows no words.
        raise ValueError(f"{folder} lacks its tokenizer: expected {' or '.join(TOKENIZERS)}.\n{FETCH} {source}")
    try:
        return processor_class.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        if is_out_of_memory(error):
            raise
        raise _not_loaded(folder, what, source, error) from error


def _not_loaded(folder: Path, what: str, source: str, error: Exception) -> ValueError:
    found = printable(str(error).strip().partition("\n")[0], 400)
    if "weights_only" in str(error) or "trust_remote_code" in str(error):  # torch and transformers advise to run what is in the folder
        found = "it needs code of its own to be run, which is never done here"
    return ValueError(
        f"{folder} could not be loaded for {what}: files are missing, damaged or of another kind.\nFound: {found}\n{FETCH} {source}"
    )


def _check_folder(folder: Path, what: str, source: str) -> None:
    if not (folder / CONFIG).is_file():
        found = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{what} needs a Hugging Face folder, but got {folder}: {found}.\n{FETCH} {source}")
