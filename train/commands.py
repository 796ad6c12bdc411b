"""The commands beside training: `train watch | export | card | upload | cache | trim`. None of them imports torch before it must."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..families import TRIMMABLE
from ..runtime.command import add_comfyui_option, add_recipe
from ..runtime.errors import UserError
from .run_directory import RunDirectory
from .watch import PORT

STOPPING = "\nStopping: what is encoded is written. A second signal ends the command at once.\n"


def command_line() -> argparse.ArgumentParser:
    """The parser of these commands."""
    parser = argparse.ArgumentParser(prog="train")
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("watch", description="Show a run's page in a browser on this machine, refreshed while it trains.")
    watch.add_argument("--port", type=int, default=PORT, help="port of 127.0.0.1 (default: %(default)s; 0: any free one)")
    export = commands.add_parser("export", description="Write a checkpoint as an encoder file, also while the run goes on.")
    export.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    export.add_argument("--out", metavar="FILE", help="file to write (default: models/text_encoders/NAME-step-N.safetensors)")
    add_comfyui_option(export)
    card = commands.add_parser("card", description="Write the model card RUN/README.md.")
    card.add_argument("--evaluation", metavar="DIR", help="folder of an evaluation, whose numbers the card shows")
    upload = commands.add_parser("upload", description="Send encoder, card, recipe and samples to Hugging Face, after asking.")
    cache = commands.add_parser("cache", description="Encode the prompts of a recipe with its teacher, into teacher.cache.")
    add_recipe(cache)
    add_comfyui_option(cache)
    trim = commands.add_parser("trim", description="Save a large text encoder without the layers that its diffusion model does not read.")
    trim.add_argument("file", metavar="FILE", help="the encoder: a path, or a name in models/text_encoders")
    trim.add_argument("--type", required=True, choices=TRIMMABLE, help="the diffusion model that the new file is for")
    trim.add_argument("--out", metavar="FILE", help="file to write (default: FILE-TYPE.safetensors, beside FILE)")
    add_comfyui_option(trim)
    for command in (watch, export, card, upload):
        command.add_argument("run", metavar="RUN", help="folder of the run")
    upload.add_argument("repo", metavar="REPO", help="repository on Hugging Face: NAME or OWNER/NAME")
    upload.add_argument("--private", action="store_true", help="to a private repository, which is made if it does not exist")
    upload.add_argument("--yes", action="store_true", help="send without asking")
    return parser


def run_command(options: argparse.Namespace, flags: list[str]) -> int:
    """Do what the options of `command_line` ask for; the exit status."""
    if options.command == "cache":
        return _cache(options, flags)
    if options.command == "trim":
        return _trim(options, flags)
    run = RunDirectory(options.run).existing()
    if options.command == "watch":
        return _watch(options)
    if options.command == "export":
        return _export(run, options, flags)
    if options.command == "card":
        from .card import write_card

        print(f"Done: {write_card(run, Path(options.evaluation) if options.evaluation else None)}")
        return 0
    from .upload import upload

    if sent := upload(run, options.repo, options.private, options.yes):
        print(f"Done: {sent}")
    return 0


def memory_advice(options: argparse.Namespace) -> str:
    """What needs less memory than these options' command."""
    if options.command != "cache":
        return "close other programs, then run the same command again."
    from .models import less_memory_for_texts
    from .recipe import load_recipe

    return less_memory_for_texts(load_recipe(options.recipe, options.set))


def _watch(options: argparse.Namespace) -> int:
    from .watch import open_server

    with open_server(options.run, options.port) as server:
        print(f"http://{server.server_address[0]}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _export(run: RunDirectory, options: argparse.Namespace, flags: list[str]) -> int:
    from .export import chosen_checkpoint, export
    from .recipe import load_recipe

    checkpoint = chosen_checkpoint(run, options.step)
    if options.out is None:
        from ..runtime.comfyui import find_comfyui, start_comfyui

        start_comfyui(find_comfyui(options.comfyui), flags)
        import folder_paths

        folder = Path(folder_paths.get_folder_paths("text_encoders")[0])
        out = folder / f"{load_recipe(str(run.recipe)).output.name}-{checkpoint.name}.safetensors"
    else:
        out = _safetensors(options.out)
    print(f"Done: {export(checkpoint, out)}")
    return 0


def _safetensors(given: str) -> Path:
    out = Path(given).expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"{out} has the ending {out.suffix!r}; expected .safetensors.", "give a file name with that ending.")
    return out


def _trim(options: argparse.Namespace, flags: list[str]) -> int:
    from tqdm import tqdm

    from ..encoder.trim import trim

    source = Path(options.file).expanduser()
    if not source.exists():
        from ..runtime.comfyui import find_comfyui, model_file, start_comfyui

        start_comfyui(find_comfyui(options.comfyui), flags)
        source = model_file(options.file, "text_encoders")
    out = _safetensors(options.out) if options.out else source.with_name(f"{source.stem}-{options.type}.safetensors")
    with tqdm(unit="B", unit_scale=True, desc=out.name, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = trim(source, TRIMMABLE[options.type], out, show)
    print(f"Done: {path} ({path.stat().st_size / 1e9:.2f} GB, of {source.stat().st_size / 1e9:.2f} GB)")
    return 0


def _cache(options: argparse.Namespace, flags: list[str]) -> int:
    from ..runtime.comfyui import find_comfyui, start_comfyui
    from .preflight import preflight
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if not recipe.teacher.cache:
        raise UserError(f"Recipe {recipe.name} has no cache.", "name one, here and for training: --set teacher.cache=FOLDER.")
    device_type = start_comfyui(find_comfyui(options.comfyui), flags, before_torch=lambda: preflight(recipe, models="teacher."))
    from ..runtime.ranks import Ranks
    from ..runtime.stop import Stopped, StopRequest

    with Ranks.open(device_type) as ranks, StopRequest(STOPPING) as stop:
        from .batches import Schedule
        from .cache_plan import wanted
        from .teacher_cache import open_cache
        from .unloaded import width_of_diffusion_model

        try:
            cache = open_cache(recipe, wanted(Schedule(recipe)), ranks, lambda: stop.requested, width_of_diffusion_model(recipe))
        except Stopped:
            if ranks.is_main:
                print("Stopped; the same command continues.")
            return 130
        if ranks.is_main:
            print(f"Done: {cache.shards.folder}")
    return 0
