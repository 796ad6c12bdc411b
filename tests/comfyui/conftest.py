"""A real ComfyUI for these tests: imported into this process, and as a server."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui").resolve()
# ComfyUI's folders: models, input, output, temp, user.
BASE = tempfile.TemporaryDirectory(prefix="distilled-t5-base-")

# Files about ComfyUI itself that take a minute and more, and single long tests: in the default run, they run on the newest version alone.
LONG = (
    *("test_distil_in_graph.py", "test_practice_accelerator.py", "test_evaluation_workflows.py"),
    *("test_trainer_teacher.py", "test_trainer_smoke.py", "test_server_flags.py", "test_start.py"),
)
LONG_TESTS = (
    "test_at_its_start_comfyui_prints_nothing_that_it_does_not_print_without_the_pack",
    "test_the_bars_of_loading_and_saving_go_from_nothing_to_the_end",
)
# Files that use the session's server: one worker runs all of them, because a second server takes as long to start as many tests.
SERVED = (
    *("test_server.py", "test_workflows.py", "test_progress_and_cancel.py", "test_evaluation_workflows.py", "test_miniature_world.py"),
    *("test_trainer_smoke.py", "test_distil_in_graph.py", "test_fuzz_loader.py"),
)
# Files about ComfyUI itself: their tests get the marker `every_version`.
ABOUT_COMFYUI = (
    *("test_nodes.py", "test_ordinary_clip.py", "test_clip_l_files.py", "test_loras_and_merges.py", "test_attention_map.py"),
    *("test_server.py", "test_progress_and_cancel.py", "test_cancel_anywhere.py"),
    *("test_workflows.py", "test_block_checkpoint.py", "test_families.py"),
    *("test_family_clips.py", "test_attention_families.py"),
    *LONG,
    *(
        "test_trainer_method.py",
        "test_trainer_fp8_teacher.py",
        "test_trainer_weights.py",
    ),
)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make `comfy` importable, unless workers run the tests."""
    if not (COMFYUI / "main.py").is_file():
        raise pytest.UsageError(f"COMFYUI_PATH is {COMFYUI}, which is not a ComfyUI: run `python dev.py test`, or set COMFYUI_PATH.")
    if not config.pluginmanager.hasplugin("dsession"):
        prepare_comfyui()


def prepare_comfyui() -> None:
    """Make `comfy` importable, on the CPU where there is no GPU, with its folders in `BASE`."""
    import torch

    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = not torch.accelerator.is_available()
    args.base_directory = BASE.name
    # As main.py does: in older versions `nodes` puts comfy/ first on sys.path, whose utils.py would then hide the package `utils`.
    import utils.extra_config  # noqa: F401 (stays in sys.modules; it imports folder_paths, which reads the arguments once)


def is_newest() -> bool:
    """Whether the ComfyUI under test is the newest supported one."""
    newest = [*json.loads((ROOT / "devtools" / "set_up.json").read_text(encoding="utf-8"))["comfyui"]][-1]
    return f'"{newest}"' in (COMFYUI / "comfyui_version.py").read_text(encoding="utf-8")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files about ComfyUI."""
    if missing := [name for name in (*ABOUT_COMFYUI, *SERVED) if not Path(__file__).with_name(name).exists()]:
        raise pytest.UsageError(f"A list in {__file__} names {', '.join(missing)}: update it after renaming or removing a file.")
    for item in items:
        if item.path.name in ABOUT_COMFYUI:
            item.add_marker(pytest.mark.every_version)
        if not is_newest() and (item.path.name in LONG or item.name in LONG_TESTS):
            item.add_marker(pytest.mark.full)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file of tests goes to one worker, and the files that use the server to the same one."""
    from xdist.scheduler import LoadFileScheduling

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "server" if Path(file).name in SERVED else file

    return OneServer(config, log)


def pytest_unconfigure() -> None:
    """Remove ComfyUI's folders."""
    BASE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def computed_once() -> Iterator[None]:
    """Tokenizers are read once, and equal recipes are rehearsed once."""
    from distilled_t5.tests.support.computed_once import read_tokenizers_once, rehearse_once

    with pytest.MonkeyPatch.context() as patch:
        read_tokenizers_once(patch, COMFYUI)
        rehearse_once(patch)
        yield


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of the ComfyUI under test."""
    return COMFYUI


@pytest.fixture(scope="session")
def stand_ins() -> Path:
    """A folder of small stand-in models, laid out as ComfyUI's `models`; made once and kept in .dev."""
    from distilled_t5.devtools.models.random_models import ensure_all

    with FileLock(ROOT / ".dev" / "stand-ins.lock"):  # one worker makes them
        return ensure_all(ROOT / ".dev" / "stand-ins")


@pytest.fixture(scope="session")
def server(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory, stand_ins: Path) -> Iterator[object]:
    """A running ComfyUI with the pack installed as a user would; `.url` is its address."""
    from distilled_t5.devtools.comfyui.server import ComfyServer

    with ComfyServer(comfyui=comfyui_path, base=tmp_path_factory.mktemp("server"), pack=pack_root) as running:
        yield running


@pytest.fixture(autouse=True)
def kill_what_is_left() -> Iterator[None]:
    """A test that fails leaves no training or evaluation running beside the next one."""
    from distilled_t5.tests.support.trainer import kill_started

    yield
    kill_started()
