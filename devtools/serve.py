"""`python dev.py serve`: ComfyUI with the pack and stand-in models in the foreground."""

import argparse
import os
import re
import sys
from pathlib import Path

from ..runtime.model_folders import SHIPPED
from .comfyui.ending import interrupt_when_asked
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
    """The names of the templates that draw, and whose models all come with the pack."""
    shipped = {path.name for path in SHIPPED.rglob("*.safetensors")}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "example_workflows").glob("*.json"))}
    return [name for name, text in texts.items() if '"VAEDecode"' in text and {*MODEL_FILE.findall(text)} <= shipped]


def serve(comfyui: Path, port: int, base: Path) -> None:
    """Serve until stopped; images, settings, saved workflows and the user's own models stay in `base`."""
    # Models this small run faster on one thread on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    link_into(ensure_all(WORK / "stand-ins"), base)
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui, base, ROOT, port=port) as server:
        print(f"Ready: {server.url}", flush=True)
        print("These templates draw in seconds with the models of the pack; open one in a browser:")
        for name in drawing_templates():
            print(f"  {server.url}/?template={name}&source={ROOT.name}")
        if (base / WORKFLOWS / f"{TRAINED}.json").exists():
            print(f"The student that demo --train has trained draws with {TRAINED}, under Workflows.")
        print("All templates are under Templates. The models of the others are stand-ins; their images are noise.")
        print(f"Put real models into {base / 'models'}, log in {server.log_path}. Ctrl-C stops it.", flush=True)
        server.wait_for_end()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--port", type=int, default=8188, help="port to serve on (default: 8188)")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of models, images and settings (default: .dev/serve)")
    arguments = parser.parse_args()
    interrupt_when_asked()
    try:
        serve(arguments.comfyui, arguments.port, arguments.base)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
