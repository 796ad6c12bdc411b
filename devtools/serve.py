"""`python dev.py serve`: ComfyUI with the pack and stand-in models in the foreground."""

import argparse
import os
import sys
from pathlib import Path

from .comfyui.ending import interrupt_when_asked
from .comfyui.server import ComfyServer
from .models.random_models import ensure_all, link_into

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".dev"


def serve(comfyui: Path, port: int, base: Path) -> None:
    """Serve until stopped; images, settings, saved workflows and the user's own models stay in `base`."""
    # Models this small run faster on one thread on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    link_into(ensure_all(WORK / "stand-ins"), base)
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui, base, ROOT, port=port) as server:
        print(f"Ready: {server.url}", flush=True)
        print("Open it in a browser; the example workflows are under Templates. Models are stand-ins; their images are noise.")
        print(f"Put real models into {base / 'models'}, log in {server.log_path}. Ctrl-C stops it.", flush=True)
        server.wait_for_end()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--port", type=int, default=8188, help="port to serve on (default: 8188)")
    parser.add_argument("--base", type=Path, default=WORK / "serve", help="folder of models, images and settings (default: .dev/serve)")
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
