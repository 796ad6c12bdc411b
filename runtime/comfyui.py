"""ComfyUI under the trainer: found, started without a server, with its own command-line flags and model folders."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from .model_folders import add_model_folders

# Flags that main.py applies before torch is imported, or that are for the server (0.16.3 to 0.30.0).
# Left out are those that switch off what the trainer never has, such as --disable-all-custom-nodes: they hold anyway; and those that
# other flags set as well: --cache-classic (--high-ram), --auto-launch (--windows-standalone-build, in every portable ComfyUI).
WHICH_GPU = ("cuda_device", "default_device", "oneapi_device_selector")
OF_THE_SERVER = (
    *("cuda_malloc", "vram_headroom", "disable_nvml_pressure", "enable_dynamic_vram", "debug_hang", "verbose", "log_stdout"),
    *("listen", "port", "tls_keyfile", "tls_certfile", "enable_cors_header", "max_upload_size", "enable_compress_response_body"),
    *("output_directory", "temp_directory", "input_directory", "user_directory", "multi_user", "database_url", "comfy_api_base"),
    *("cache_ram", "cache_lru", "cache_none", "preview_method", "preview_size", "default_hashing_function"),
    *("front_end_version", "front_end_root", "enable_manager", "enable_manager_legacy_ui", "whitelist_custom_nodes"),
    *("quick_test_for_ci", "enable_assets", "enable_asset_hashing", "feature_flag", "list_feature_flags"),
)

ROOT = Path(__file__).resolve().parent.parent


def find_comfyui(given: str | None = None) -> Path:
    """The folder of ComfyUI's main.py: the given one, else the one whose custom_nodes this pack lies in, else the developer's copy.

    Raises ValueError that says where was looked.
    """
    # absolute(), not resolve(): a pack that is linked into custom_nodes belongs to that ComfyUI.
    around = Path(__file__).absolute().parent.parent.parent
    places = [Path(given).expanduser()] if given else [around.parent] if around.name == "custom_nodes" else [ROOT / ".dev" / "comfyui"]
    for place in places:
        if (place / "main.py").is_file() and (place / "comfy").is_dir():
            return place.resolve()
    looked = ", ".join(map(str, places))
    raise ValueError(
        f"No ComfyUI found: expected main.py and comfy/ in {looked}.\n"
        "What to do: give its folder with --comfyui, or put this pack into ComfyUI/custom_nodes."
    )


def start_comfyui(folder: Path, flags: Sequence[str]) -> None:
    """Make `comfy` importable with these flags, as ComfyUI's main.py does: arguments first, then model paths. Once per process.

    `--cpu` is added where torch sees no accelerator, since the host would stop there. `--disable-async-offload` is added unless the flags
    say otherwise: weights that the host brings over asynchronously lie in buffers that it writes over, and autograd needs them later.
    Raises ValueError for flags under which nothing can be trained.
    """
    flags = list(flags)
    if not _has_accelerator() and "--cpu" not in flags:
        flags.append("--cpu")
    if not any("async-offload" in flag for flag in flags):
        flags.append("--disable-async-offload")
    sys.path.insert(0, str(folder))
    importlib.import_module("comfy.options").enable_args_parsing()
    before, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        parsed = importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = before
    arguments = parsed.args
    _refuse_flags_of_main({name for name, value in vars(arguments).items() if value != parsed.parser.get_default(name)})
    _refuse_fast_products(arguments)
    importlib.import_module("folder_paths")
    _add_model_paths(folder, arguments.extra_model_paths_config)


def _has_accelerator() -> bool:
    import torch

    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    # torch before 2.6
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _refuse_flags_of_main(given: Set[str]) -> None:
    """Raise ValueError for flags that only ComfyUI's main.py applies, which the trainer does not run: they would change nothing."""
    if chosen := given & set(WHICH_GPU):
        raise ValueError(
            f"{_as_flags(chosen)}: ComfyUI's main.py alone applies this, before it imports torch.\n"
            "What to do: choose the GPU before the command instead: CUDA_VISIBLE_DEVICES=N python ... (HIP_VISIBLE_DEVICES, "
            "ONEAPI_DEVICE_SELECTOR); torchrun gives every process its own of those that are visible."
        )
    if others := given & set(OF_THE_SERVER):
        raise ValueError(
            f"{_as_flags(others)}: ComfyUI's main.py alone applies this, and the trainer starts no server.\n"
            "What to do: leave it out. Folders of models are those of --base-directory and --extra-model-paths-config."
        )


def _as_flags(names: Iterable[str]) -> str:
    return " ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def _refuse_fast_products(arguments: Any) -> None:
    """Raise ValueError for the products of `--fast` that have no gradient: ComfyUI would train nothing, without a word."""
    without = {"fp8_matrix_mult", "cublas_ops"} & {feature.value for feature in arguments.fast or ()}
    if without:
        raise ValueError(
            f"ComfyUI's --fast {' '.join(sorted(without))} has no gradient: the student would learn nothing.\n"
            "What to do: leave --fast out, or name what may stay: -- --fast fp16_accumulation."
        )


def _add_model_paths(folder: Path, configs: list[list[str]] | None) -> None:
    load = importlib.import_module("utils.extra_config").load_extra_path_config
    own = folder / "extra_model_paths.yaml"
    for config in [*([str(own)] if own.is_file() else []), *(path for group in configs or [] for path in group)]:
        load(config)
    add_model_folders()


def model_file(name: str, kind: str) -> Path:
    """A model file by the name that ComfyUI lists it under (`kind` is a folder of `models`), or by its path.

    Raises ValueError that says where was looked.
    """
    import folder_paths

    folders = folder_paths.get_folder_paths(kind)
    found = folder_paths.get_full_path(kind, name)
    # Hugging Face models are folders, which ComfyUI's own lists leave out.
    places = [Path(found)] if found else [*(Path(folder, name) for folder in folders), Path(name).expanduser()]
    for place in places:
        if place.exists():
            return place.resolve()
    raise ValueError(
        f"{name} was not found, neither as a path nor in {', '.join(folders)}.\n"
        f"What to do: put it into ComfyUI's models/{kind}, or give its path."
    )


@contextlib.contextmanager
def lines_of_host(beginning: str) -> Iterator[list[str]]:
    """What ComfyUI logs while the context is open and that begins so. Its loaders tell nobody else that weights were missing."""
    listener = _Listener(beginning)
    logging.getLogger().addHandler(listener)
    try:
        yield listener.lines
    finally:
        logging.getLogger().removeHandler(listener)


class _Listener(logging.Handler):
    def __init__(self, beginning: str) -> None:
        super().__init__(logging.WARNING)
        self.beginning = beginning
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.beginning):
            self.lines.append(record.getMessage())


def check_output_folder() -> None:
    """Make the folder that finished encoders go to, and see that it takes files, before days are spent on one. Raises OSError."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("text_encoders")[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"The finished encoder is to go into {folder}, which cannot be written to: {error.strerror or error}.\n"
            "What to do: see that ComfyUI's models/text_encoders may be written to, or name another folder with -- --base-directory."
        ) from error
