"""ComfyUI in this process: found, started without a server, with its own command-line flags and model folders."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from .model_folders import add_model_folders

# Flags that main.py applies before torch is imported, or that are for the server (0.16.3 to 0.30.0). Not listed: flags that disable what
# the trainer never uses, such as --disable-all-custom-nodes; and flags that other flags set as well: --cache-classic (--high-ram),
# --auto-launch (--windows-standalone-build, in every portable ComfyUI).
WHICH_GPU = ("cuda_device", "default_device", "oneapi_device_selector")
OF_THE_SERVER = (
    *("cuda_malloc", "vram_headroom", "disable_nvml_pressure", "enable_dynamic_vram", "debug_hang", "verbose", "log_stdout"),
    *("listen", "port", "tls_keyfile", "tls_certfile", "enable_cors_header", "max_upload_size", "enable_compress_response_body"),
    *("output_directory", "temp_directory", "input_directory", "user_directory", "multi_user", "database_url", "comfy_api_base"),
    *("cache_ram", "cache_lru", "cache_none", "preview_method", "preview_size", "default_hashing_function"),
    *("front_end_version", "front_end_root", "enable_manager", "enable_manager_legacy_ui", "whitelist_custom_nodes"),
    *("quick_test_for_ci", "enable_assets", "enable_asset_hashing", "feature_flag", "list_feature_flags"),
)

# SageAttention is for inference, and ComfyUI gives FlashAttention no backward pass.
ATTENTION_WITHOUT_GRADIENT = ("use_sage_attention", "use_flash_attention")
ROOT = Path(__file__).resolve().parent.parent
OLDEST = "0.16.3"
# In the place of a model file: do without.
NO_FILE = "none"


def find_comfyui(given: str | None = None) -> Path:
    """ComfyUI's folder: the given one, else the one in whose custom_nodes this pack is, else the developer's copy.

    Raises ValueError that names the folder searched.
    """
    # Not resolved: a pack that is linked into custom_nodes belongs to that ComfyUI.
    around = Path(__file__).absolute().parents[2]
    place = Path(given).expanduser() if given else around.parent if around.name == "custom_nodes" else ROOT / ".dev" / "comfyui"
    if (place / "main.py").is_file() and (place / "comfy").is_dir():
        return place.resolve()
    raise ValueError(
        f"No ComfyUI found: expected main.py and comfy/ in {place}.\n"
        "What to do: give its folder with --comfyui, or put this pack into ComfyUI/custom_nodes."
    )


def refuse_old_comfyui(version: str) -> None:
    """Raise ValueError if this version of ComfyUI is too old for the pack."""
    if [int(number) for number in re.findall(r"\d+", version)] < [int(number) for number in OLDEST.split(".")]:
        raise ValueError(f"ComfyUI {version} is too old: {OLDEST} or newer is needed.\nWhat to do: update ComfyUI.")


def version_of(folder: Path) -> str:
    file = folder / "comfyui_version.py"
    found = re.search('__version__ = "(.+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else "without a version"


def start_comfyui(folder: Path, flags: Sequence[str], before_torch: Callable[[], object] = lambda: None) -> str:
    """Make `comfy` importable with these flags, as ComfyUI's main.py does: arguments first, then model paths. Once per process.

    Returns the type of the device that it uses, "cpu" without an accelerator. `before_torch` is called when model files can be found and
    torch is not imported yet. Sets `--cpu` if torch finds no accelerator, since ComfyUI would stop, and adds `--disable-async-offload`
    unless the flags say otherwise: ComfyUI reuses the buffers of weights that it copies asynchronously, but autograd needs the weights
    later. Raises ValueError for a ComfyUI that is too old and for flags with which
    nothing can be trained.
    """
    version = version_of(folder)
    refuse_old_comfyui(version)
    sys.stderr.write(f"ComfyUI {version}: {folder}\n")
    flags = list(flags)
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
    refuse_without_gradient(arguments)
    importlib.import_module("folder_paths")
    _add_model_paths(folder, arguments.extra_model_paths_config)
    before_torch()
    # As ComfyUI's own tests do; only modules that are imported later read it.
    from .accelerator import accelerator_type

    kind = None if arguments.cpu else accelerator_type()
    arguments.cpu = kind is None
    return kind or "cpu"


def _refuse_flags_of_main(given: Set[str]) -> None:
    """Raise ValueError for flags that only ComfyUI's main.py applies: without it they would change nothing."""
    if chosen := given & set(WHICH_GPU):
        raise ValueError(
            f"{_as_flags(chosen)}: only ComfyUI's main.py applies this, before it imports torch.\n"
            "What to do: choose the GPU before the command instead: CUDA_VISIBLE_DEVICES=N python ... (HIP_VISIBLE_DEVICES, "
            "ONEAPI_DEVICE_SELECTOR); torchrun assigns one visible GPU to each process."
        )
    if others := given & set(OF_THE_SERVER):
        raise ValueError(
            f"{_as_flags(others)}: only ComfyUI's main.py applies this, and no server is started here.\n"
            "What to do: leave it out. Model folders are set by --base-directory and --extra-model-paths-config."
        )


def _as_flags(names: Iterable[str]) -> str:
    return " ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def refuse_without_gradient(arguments: Any) -> None:
    """Raise ValueError for ComfyUI's flags whose arithmetic has no gradient, or a wrong one: training would silently have no effect."""
    attention = _as_flags(name for name in ATTENTION_WITHOUT_GRADIENT if getattr(arguments, name, False))
    products = {"fp8_matrix_mult", "cublas_ops"} & {feature.value for feature in arguments.fast or ()}
    if flags := " ".join([*attention.split(), *(["--fast", *sorted(products)] if products else [])]):
        instead = f"without {attention}" if attention else "without --fast, or with --fast fp16_accumulation, which has a gradient"
        raise ValueError(
            f"ComfyUI's {flags} has no gradient: the student would learn nothing.\n"
            f"What to do: start ComfyUI {instead} (the command: after --)."
        )


def _add_model_paths(folder: Path, configs: list[list[str]] | None) -> None:
    load = importlib.import_module("utils.extra_config").load_extra_path_config
    own = folder / "extra_model_paths.yaml"
    for config in [*([str(own)] if own.is_file() else []), *(path for group in configs or [] for path in group)]:
        load(config)
    add_model_folders()


def model_file(name: str, kind: str) -> Path:
    """A model file by the name under which ComfyUI lists it (`kind` is a folder of `models`), or by its path.

    A file that is a link keeps its name, which has the extension. Raises ValueError that names the folders searched.
    """
    import folder_paths

    folders = folder_paths.get_folder_paths(kind)
    found = folder_paths.get_full_path(kind, name)
    # ComfyUI does not list folders, such as Hugging Face models.
    places = [Path(found)] if found else [*(Path(folder, name) for folder in folders), Path(name).expanduser()]
    for place in places:
        if place.exists():
            return place.parent.resolve() / place.name
    raise ValueError(
        f"{name} was not found, neither as a path nor in {', '.join(folders)}.\n"
        f"What to do: put it into ComfyUI's models/{kind}, or give its path."
    )


@contextlib.contextmanager
def logged_lines(beginning: str) -> Iterator[list[str]]:
    """The warnings with this beginning that ComfyUI logs while the context is open. Its loaders report missing weights only there."""
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
    """Create the folder of finished encoders and check that files can be written to it. Raises OSError."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("text_encoders")[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"The finished encoder cannot be written to {folder}: {error.strerror or error}.\n"
            "What to do: check the permissions of ComfyUI's models/text_encoders, "
            "or name another folder with --base-directory (the command: after --)."
        ) from error
