"""`python dev.py serve`: ComfyUI with the pack and stand-in models in the foreground."""

import argparse
import json
import os
import re
from pathlib import Path

from ..runtime.model_folders import SHIPPED
from .comfyui.ending import run_to_its_end
from .comfyui.server import ComfyServer
from .models.random_models import ensure_all, link_into

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".dev"
BASE = WORK / "serve"
# The student of `demo --train`, and the workflow that draws with it, in the folder that is served.
TRAINED = "demo_student"
WORKFLOWS = Path("user", "default", "workflows")
MODEL_FILE = re.compile(r'"([^"]+\.safetensors)"')


def drawing_templates() -> list[str]:
    """The names of the templates that draw, whose models all come with the pack, and that need no package for OCR."""
    shipped = {path.name for path in SHIPPED.rglob("*.safetensors")}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "example_workflows").glob("*.json"))}
    drawing = {name: text for name, text in texts.items() if '"VAEDecode"' in text and "DistilledT5OCRAccuracy" not in text}
    return [name for name, text in drawing.items() if {*MODEL_FILE.findall(text)} <= shipped]


def also_served(comfyui: Path, base: Path) -> tuple[str, ...]:
    """The flags with which ComfyUI also lists the encoders that `train` writes: into the folder of ComfyUI, not into `base`."""
    base.mkdir(parents=True, exist_ok=True)
    config = base / "distilled-t5-students.yaml"
    config.write_text(json.dumps({"train": {"text_encoders": str(encoders_of(comfyui))}}), encoding="utf-8")  # JSON is YAML
    return "--extra-model-paths-config", str(config)


def encoders_of(comfyui: Path) -> Path:
    """The folder that the trainer's command writes encoders to."""
    return comfyui.absolute() / "models" / "text_encoders"


def welcome(url: str, comfyui: Path, base: Path) -> str:
    """What to open, and which models are there."""
    lines = ["Ready. Open a link: each is a template that draws in seconds (number 10 trains first, for two minutes):"]
    lines += [f"  {url}/?template={name}&source={ROOT.name}" for name in drawing_templates()]
    if (base / WORKFLOWS / f"{TRAINED}.json").exists():
        lines.append(f"The student of demo --train draws with the workflow {TRAINED}: press W in ComfyUI and open it.")
    lines += [
        f"Students of train, in {encoders_of(comfyui)}, are in the list of Distilled Text Encoder Loader.",
        f"{url} alone opens ComfyUI's own first workflow, which cannot draw here: use the links.",
        "The templates of Flux and other families open, too. Their models here are stand-ins with random weights, which draw noise;",
        f"to get images, replace the stand-ins in {base / 'models'} with the real files.",
    ]
    return "\n".join(lines)


def serve(comfyui: Path, port: int, base: Path) -> None:
    """Serve until stopped; images, settings, saved workflows and the user's own models stay in `base`."""
    # Models this small run faster on one thread on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    link_into(ensure_all(WORK / "stand-ins"), base)
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui, base, ROOT, also_served(comfyui, base), port) as server:
        print(welcome(server.url, comfyui, base))
        print(f"ComfyUI's log: {server.log_path}. Ctrl-C stops it.", flush=True)
        server.wait_for_end()


def main() -> None:
    """Read the command line, which dev.py describes, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base", type=Path, default=BASE)
    arguments = parser.parse_args()
    run_to_its_end(lambda: serve(arguments.comfyui, arguments.port, arguments.base))


if __name__ == "__main__":
    main()
