"""The pack at work in a real ComfyUI: `python -m distilled_t5.devtools.demo --comfyui FOLDER --out FOLDER`.

Starts ComfyUI with the pack installed as a user would install it, runs example_workflows/flux-dev.json with two prompts through the HTTP
API, and leaves the pictures, timings.json and the server's log in the output folder.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .ending import interrupt_when_asked
from .server import ComfyServer, has_accelerator
from .stand_ins import ensure_all, link_into
from .workflow import set_inputs, to_api_prompt

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows" / "flux-dev.json"
PROMPTS = (
    "A red fox in a blue scarf sits on a park bench and reads a newspaper, morning light, 35 mm photograph",
    "Two green glass bottles to the left of a yellow lemon on a white table, still life, oil painting",
)
CPU_SIDE_PX, CPU_STEPS = 512, 8
STAND_INS = "The models are stand-ins: real file layouts with random weights. So the pictures are noise; the encoder's work is real."


def run_demo(comfyui: Path, out: Path) -> dict[str, Any]:
    """Run both prompts; returns what timings.json says."""
    out.mkdir(parents=True, exist_ok=True)
    models = ensure_all(ROOT / ".dev" / "stand-ins")
    with tempfile.TemporaryDirectory(prefix="distilled-t5-demo-") as folder:
        base = Path(folder)
        link_into(models, base)
        print("Starting ComfyUI with the pack in custom_nodes ...", flush=True)
        started = time.monotonic()
        server = ComfyServer(comfyui, base, ROOT)
        with log_kept(server, out), server:
            timings = describe(server) | {"server_start_s": round(time.monotonic() - started, 1)}
            prompt = demo_prompt(server)
            timings["runs"] = [run_once(server, prompt, text, out / f"picture-{n}.png") for n, text in enumerate(PROMPTS, start=1)]
            timings["encode_changed_prompt_s"] = encode_alone(server, prompt)
    (out / "timings.json").write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")
    return timings


@contextlib.contextmanager
def log_kept(server: ComfyServer, out: Path) -> Iterator[None]:
    """Leaves the server's log in the output folder, above all when something fails."""
    try:
        yield
    finally:
        if server.log_path.exists():
            shutil.copyfile(server.log_path, out / "server.log")


def describe(server: ComfyServer) -> dict[str, Any]:
    """The machine and the versions that the numbers belong to."""
    stats = server.get_json("/system_stats")
    return {
        "comfyui": stats["system"]["comfyui_version"],
        "torch": stats["system"]["pytorch_version"],
        "device": stats["devices"][0]["name"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "workflow": WORKFLOW.relative_to(ROOT).as_posix(),
        "models": STAND_INS,
    }


def demo_prompt(server: ComfyServer) -> dict[str, Any]:
    """The shipped workflow as an API prompt; a smaller picture and fewer steps where there is no GPU."""
    prompt = to_api_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    if not has_accelerator():
        set_inputs(prompt, "EmptySD3LatentImage", width=CPU_SIDE_PX, height=CPU_SIDE_PX)
        set_inputs(prompt, "KSampler", steps=CPU_STEPS)
    return prompt


def run_once(server: ComfyServer, prompt: dict[str, Any], text: str, picture: Path) -> dict[str, Any]:
    """Make one picture; returns its prompt, seconds, size, file and what the loader said."""
    set_inputs(prompt, "CLIPTextEncode", text=text)
    print(f"Running {WORKFLOW.relative_to(ROOT).as_posix()}: {text}", flush=True)
    started = time.monotonic()
    entry = server.run(prompt)
    seconds = time.monotonic() - started
    [image] = server.images(entry)
    image.save(picture)
    said = ["".join(output["text"]) for output in entry["outputs"].values() if "text" in output]
    [steps] = [node["inputs"]["steps"] for node in prompt.values() if node["class_type"] == "KSampler"]
    return {
        "prompt": text,
        "seconds": round(seconds, 2),
        "size_px": list(image.size),
        "steps": steps,
        "file": picture.name,
        "loaded": said[0] if said else "",
    }


def encode_alone(server: ComfyServer, prompt: dict[str, Any]) -> float:
    """Seconds for a changed prompt to pass through loader (kept by ComfyUI) and text encode, without a picture."""
    kept = {node_id: node for node_id, node in prompt.items() if node["class_type"] in ("DistilledT5Loader", "CLIPTextEncode")}
    [encode] = [node_id for node_id, node in kept.items() if node["class_type"] == "CLIPTextEncode"]
    kept["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [encode, 0]}, "_meta": {"title": "Embedding"}}
    set_inputs(kept, "CLIPTextEncode", text="Three red balloons over a quiet harbour")
    started = time.monotonic()
    server.run(kept)
    return round(time.monotonic() - started, 2)


def report(timings: dict[str, Any], out: Path) -> str:
    """What happened, for a person."""
    first, second = timings["runs"]
    size = " x ".join(str(side) for side in first["size_px"])
    loaded = "\n".join(f"    {line}" for line in first["loaded"].splitlines())
    return "\n".join(
        [
            f"\nComfyUI {timings['comfyui']} on {timings['device']} ran {timings['workflow']}: {size} pixels, {first['steps']} steps.",
            "  Loaded by Distilled T5 Loader:",
            loaded,
            f"  ComfyUI's start                        {timings['server_start_s']:6.1f} s",
            f"  first picture, loading all models      {first['seconds']:6.1f} s   {out / first['file']}",
            f"  next picture, after a change of prompt {second['seconds']:6.1f} s   {out / second['file']}",
            f"  encoding a changed prompt, alone       {timings['encode_changed_prompt_s']:6.1f} s",
            f"  all numbers                                      {out / 'timings.json'}",
            STAND_INS,
            "To use it in a browser: python dev.py serve",
        ]
    )


def main() -> None:
    """Read the command line, run the demo and print the report."""
    parser = argparse.ArgumentParser(description="Run a shipped workflow in a real ComfyUI.")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures, timings.json and server.log")
    arguments = parser.parse_args()
    interrupt_when_asked()
    try:
        timings = run_demo(arguments.comfyui, arguments.out)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"The demo failed: {error}")
    print(report(timings, arguments.out))


if __name__ == "__main__":
    main()
