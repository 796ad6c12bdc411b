"""What importing costs: the root imports nothing, students, families and encoder files need torch and safetensors alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from distilled_t5 import comfy_entrypoint

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
# What runs inside ComfyUI, and what trains by transformers; every other module of these rooms needs torch and safetensors alone.
ROOMS = ("students", "families", "encoder")
IN_COMFYUI = {"encoder.companions", "encoder.large", "encoder.served", "encoder.teacher", "students.t5.served", "students.qwen3.served"}
BY_TRANSFORMERS = {f"students.{kind}.{name}" for kind in ("t5", "qwen3") for name in ("trained", "pretrained")}
BY_PYDANTIC = {"students.t5.table", "students.qwen3.table"}
HEAVY = {
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "comfy",
    "comfy_api",
    "folder_paths",
    "PIL",
    "scipy",
    "matplotlib",
    "sklearn",
    "easyocr",
}

ROOT_ALONE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("distilled_t5", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
module = importlib.util.module_from_spec(spec)
sys.modules["distilled_t5"] = module
before = set(sys.modules)
spec.loader.exec_module(module)
"""
WITHOUT_PACKAGE = """
import json, sys
before = set(sys.modules)
exec(compile(open(sys.argv[1] + "/__init__.py").read(), "__init__.py", "exec"), {"__name__": "__init__", "__package__": ""})
"""
ONE_MODULE = (
    ROOT_ALONE + "import torch, safetensors.torch\nbefore = set(sys.modules)\nimport importlib\nimportlib.import_module(sys.argv[2])\n"
)
TELL = "print(json.dumps(sorted(set(sys.modules) - before)))\n"


def new_modules(code: str, *arguments: str) -> set[str]:
    """Names of the modules that code imports after its line `before = ...`, in a fresh interpreter without ComfyUI."""
    done = subprocess.run([sys.executable, "-I", "-c", code + TELL, str(ROOT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def tops(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def modules_of(rooms: tuple[str, ...]) -> list[str]:
    """Dotted names of the modules of some rooms, below the pack."""
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for room in rooms for path in (ROOT / room).rglob("[!_]*.py"))


@pytest.mark.parametrize("code", [ROOT_ALONE, WITHOUT_PACKAGE], ids=["as a package", "as pytest may"])
def test_root_imports_nothing(code):
    assert new_modules(code) <= {"__future__"}


def test_the_nodes_of_a_comfyui_that_is_too_old_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__="0.3.64"))
    with pytest.raises(ValueError, match=r"^ComfyUI 0\.3\.64 is too old: 0\.16\.3 or newer is needed\.\nWhat to do: update ComfyUI\.$"):
        asyncio.run(comfy_entrypoint())


def test_importing_the_encoder_package_imports_none_of_its_modules():
    code = ROOT_ALONE + "import importlib\nbefore = set(sys.modules)\nimportlib.import_module(sys.argv[2])\n"
    assert new_modules(code, "distilled_t5.encoder") == {"distilled_t5.encoder"}


def test_students_families_and_encoder_files_need_torch_and_safetensors_alone():
    names = [f"distilled_t5.{name}" for name in modules_of(ROOMS) if name not in IN_COMFYUI | BY_TRANSFORMERS | BY_PYDANTIC]
    assert "distilled_t5.encoder.files" in names
    every = ONE_MODULE + "".join(f"importlib.import_module({name!r})\n" for name in names)
    new = new_modules(every, "distilled_t5.encoder")
    assert set(names) <= new
    foreign = tops(new) - {"distilled_t5"} - sys.stdlib_module_names
    assert foreign <= {"safetensors", "torch"}


def test_modules_that_touch_no_tensor_need_no_torch():
    names = ["students", "students.t5", "families", "encoder.metadata", "encoder.lora_log", "encoder.prompt_length"]
    every = ROOT_ALONE + "import importlib\n" + "".join(f"importlib.import_module('distilled_t5.{name}')\n" for name in names)
    assert not tops(new_modules(every)) & HEAVY


METRICS = (
    "compbench",
    "compbench_judges",
    "measured",
    "metrics",
    "distances",
    "embeddings",
    "local_weights",
    "ocr",
    "pictures",
    "readers",
)


def test_importing_metrics_imports_no_back_end_and_no_comfyui():
    every = ONE_MODULE + "".join(f"importlib.import_module('distilled_t5.evaluate.{name}')\n" for name in METRICS)
    new = tops(new_modules(every, "distilled_t5.evaluate"))
    assert new & HEAVY <= {"numpy", "torch", "safetensors"}
    assert not new & {"cv2", "lpips", "skimage", "torch_fidelity", "torchvision"}
