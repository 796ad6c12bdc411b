"""Writes example_workflows/ and subgraphs/: `python -m distilled_t5.devtools.build_workflows`. Deterministic; a test compares the files."""

import json
from collections.abc import Callable
from pathlib import Path

from . import evaluation_workflows, notes
from .blueprint import wrap
from .canvas import Canvas, Column, Json, Port
from .workflow_parts import (
    KINDS,
    LOADER_VALUES,
    MINIATURE_PX,
    MINIATURE_STUDENT,
    MINIATURE_TEACHER,
    MODELS_W,
    MODELS_X,
    NOTE_W,
    NOTE_X,
    OUR_LOOK,
    PICTURE_W,
    PICTURE_X,
    PROMPT_W,
    PROMPT_X,
    SAMPLING_W,
    SAMPLING_X,
    encode_with_ours,
    enlarged,
    load_models,
    miniature_models,
    models,
    note_height,
    picture,
    sample,
    show_info,
)

ROOT = Path(__file__).resolve().parent.parent
BLUEPRINT_NAME = "Flux text with Distilled T5"


def flux(name: str, file: str, steps: int, prompt: str, note: str, guidance: float | None) -> Canvas:
    """Text to picture with the stock text encode node; `guidance` None for schnell."""
    canvas = Canvas(name, KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(note), "Read me", note)
    left = Column(canvas, MODELS_X, MODELS_W)
    unet, loader, vae = load_models(left, file)
    show_info(left, loader)
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    encode = middle.add("CLIPTextEncode", 220, prompt, inputs={"clip": (loader, "CLIP")}, title="Prompt")
    members, positive = [encode], (encode, "CONDITIONING")
    if guidance is not None:
        members.append(middle.add("FluxGuidance", 80, guidance, inputs={"conditioning": positive}))
        positive = (members[-1], "CONDITIONING")
    members.append(middle.add("ConditioningZeroOut", 60, inputs={"conditioning": (encode, "CONDITIONING")}, title="Empty negative"))
    canvas.group("2. Prompt", "prompt", members)
    finish(canvas, steps, unet, vae, positive, (members[-1], "CONDITIONING"))
    return canvas


def finish(canvas: Canvas, steps: int, unet: int, vae: int, positive: Port, negative: Port) -> None:
    """Size, sampler and picture, in the two columns on the right."""
    right = Column(canvas, SAMPLING_X, SAMPLING_W)
    size = right.add("EmptySD3LatentImage", 150, 1024, 1024, 1, title="Picture size")
    wires = {"model": (unet, "MODEL"), "positive": positive, "negative": negative, "latent_image": (size, "LATENT")}
    sampler = sample(right, steps, wires)
    canvas.group("3. Size and sampling", "sampling", [size, sampler])
    canvas.group("4. Picture", "picture", picture(Column(canvas, PICTURE_X, PICTURE_W), sampler, vae, f"distilled-t5/{canvas.name}"))


def flux_dev() -> Json:
    return flux("flux-dev", "flux1-dev.safetensors", 20, notes.FOX, notes.DEV, guidance=3.5).to_json()


def flux_schnell() -> Json:
    return flux("flux-schnell", "flux1-schnell.safetensors", 4, notes.LIGHTHOUSE, notes.SCHNELL, guidance=None).to_json()


def flux_dev_lora() -> Json:
    canvas = Canvas("flux-dev-lora", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.LORA), "Read me", notes.LORA)
    left, file = Column(canvas, MODELS_X, MODELS_W), "FLUX-dev-lora-add_details.safetensors"
    unet, loader, vae = load_models(left, "flux1-dev.safetensors")
    left.new_group()
    wires = {"model": (unet, "MODEL"), "clip": (loader, "CLIP")}
    lora = left.add("LoraLoader", 200, file, 1.0, 1.0, inputs=wires, models=models(file))
    canvas.group("LoRA", "control", [lora])
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    encode, negative = encode_with_ours(middle, (lora, "CLIP"), notes.WATCHMAKER)
    canvas.group("2. Prompt", "prompt", [encode, negative])
    finish(canvas, 20, lora, vae, (encode, "CONDITIONING"), (negative, "CONDITIONING"))
    return canvas.to_json()


def flux_dev_controlnet() -> Json:
    canvas = Canvas("flux-dev-controlnet", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.CONTROLNET), "Read me", notes.CONTROLNET)
    left, file = Column(canvas, MODELS_X, MODELS_W), "flux-canny-controlnet-v3.safetensors"
    unet, loader, vae = load_models(left, "flux1-dev.safetensors")
    left.new_group()
    load = left.add("ControlNetLoader", 80, file, models=models(file))
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    encode, negative = encode_with_ours(middle, (loader, "CLIP"), notes.CABIN)
    canvas.group("2. Prompt", "prompt", [encode, negative])
    middle.new_group()
    source = middle.add("LoadImage", 370, "example.png", "image", title="Picture whose edges to keep")
    edges = middle.add("Canny", 120, 0.2, 0.5, inputs={"image": (source, "IMAGE")})
    shown = left.add("PreviewImage", 320, inputs={"images": (edges, "IMAGE")}, title="Edges")
    control = add_control(middle, encode, negative, load, edges, vae)
    canvas.group("ControlNet", "control", [load, shown])
    canvas.group("Edges and their strength", "control", [source, edges, control])
    finish(canvas, 20, unet, vae, (control, "positive"), (control, "negative"))
    return canvas.to_json()


def add_control(column: Column, encode: int, negative: int, load: int, edges: int, vae: int) -> int:
    """The stock node that hangs a ControlNet on both conditionings."""
    wires: dict[str, Port] = {"positive": (encode, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "vae": (vae, "VAE")}
    wires |= {"control_net": (load, "CONTROL_NET"), "image": (edges, "IMAGE")}
    return column.add("ControlNetApplyAdvanced", 270, 0.7, 0.0, 0.8, inputs=wires)


def t5xxl_vs_distilled() -> Json:
    canvas = Canvas("t5xxl-vs-distilled", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.VERSUS), "Read me", notes.VERSUS)
    left = Column(canvas, MODELS_X, MODELS_W)
    unet, loader, vae = load_models(left, "flux1-dev.safetensors")
    left.new_group()
    names = ("clip_l.safetensors", "t5xxl_fp16.safetensors")
    teacher = left.add("DualCLIPLoader", 160, *names, "flux", "default", models=models(*names))
    canvas.group("The big encoder", "control", [teacher])
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    prompt = middle.add("PrimitiveStringMultiline", 220, notes.CAFE, title="Prompt for both")
    seed = middle.add("PrimitiveInt", 110, 42, "fixed", title="Seed for both")
    size = middle.add("EmptySD3LatentImage", 150, 1024, 1024, 1, title="Size for both")
    canvas.group("2. The same for both", "prompt", [prompt, seed, size])
    shared: dict[str, Port] = {"model": (unet, "MODEL"), "latent_image": (size, "LATENT"), "seed": (seed, "INT")}
    lanes = (("3. Distilled T5", "sampling", loader, SAMPLING_X, "distilled"), ("3. T5-XXL", "control", teacher, 1640, "t5xxl"))
    for title, colour, clip, x, prefix in lanes:
        lane = Column(canvas, x, PICTURE_W)
        encode = lane.add("CLIPTextEncode", 110, "", inputs={"clip": (clip, "CLIP"), "text": (prompt, "STRING")})
        guidance = lane.add("FluxGuidance", 80, 3.5, inputs={"conditioning": (encode, "CONDITIONING")})
        negative = lane.add("ConditioningZeroOut", 60, inputs={"conditioning": (encode, "CONDITIONING")}, title="Empty negative")
        sampler = sample(lane, 20, shared | {"positive": (guidance, "CONDITIONING"), "negative": (negative, "CONDITIONING")})
        saved = picture(lane, sampler, vae, f"distilled-t5/{prefix}")
        canvas.group(title, colour, [encode, guidance, negative, sampler, *saved])
    return canvas.to_json()


def save_a_copy() -> Json:
    canvas = Canvas("save-a-copy", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.SAVE), "Read me", notes.SAVE)
    left = Column(canvas, MODELS_X, MODELS_W)
    loader = left.add("DistilledT5Loader", 250, *LOADER_VALUES, models=models(*LOADER_VALUES[:2]), **OUR_LOOK)
    info = left.add("PreviewAny", 160, inputs={"source": (loader, "info")}, title="What was loaded")
    canvas.group("1. Load", "models", [loader, info])
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    encode = middle.add("DistilledT5TextEncode", 250, notes.FOX, 3.5, inputs={"clip": (loader, "CLIP")}, **OUR_LOOK)
    count = middle.add("PreviewAny", 160, inputs={"source": (encode, "token_count")}, title="Does my prompt fit?")
    canvas.group("2. Count the tokens of a prompt", "prompt", [encode, count])
    right = Column(canvas, SAMPLING_X, PROMPT_W)
    save = right.add("DistilledT5Save", 150, "my_distilled_t5", "fp8_e4m3fn", inputs={"clip": (loader, "CLIP")}, **OUR_LOOK)
    path = right.add("PreviewAny", 160, inputs={"source": (save, "file")}, title="The new file")
    canvas.group("3. Save a copy of half the size", "picture", [save, path])
    return canvas.to_json()


def flux_dev_app() -> Json:
    """App mode: the browser shows a form with the inputs named here and the picture, not the graph."""
    canvas = Canvas("flux-dev-app", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.APP), "Read me", notes.APP)
    unet, loader, vae = load_models(Column(canvas, MODELS_X, MODELS_W), "flux1-dev.safetensors")
    encode, negative = encode_with_ours(Column(canvas, PROMPT_X, PROMPT_W), (loader, "CLIP"), notes.FOX)
    canvas.group("2. Prompt", "prompt", [encode, negative])
    finish(canvas, 20, unet, vae, (encode, "CONDITIONING"), (negative, "CONDITIONING"))
    by_type = {node["type"]: str(node["id"]) for node in canvas.nodes}
    chosen = {"DistilledT5TextEncode": ("text", "guidance"), "EmptySD3LatentImage": ("width", "height"), "KSampler": ("seed", "steps")}
    inputs = [[by_type[node_type], widget] for node_type, widgets in chosen.items() for widget in widgets]
    return canvas.to_json(linearMode=True, linearData={"inputs": inputs, "outputs": [by_type["SaveImage"]]})


def miniature() -> Json:
    canvas = Canvas("miniature", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.MINIATURE), "Read me", notes.MINIATURE)
    unet, [loader], vae = miniature_models(Column(canvas, MODELS_X, MODELS_W), ("Distilled T5 Loader", MINIATURE_STUDENT))
    encode, negative = encode_with_ours(Column(canvas, PROMPT_X, PROMPT_W), (loader, "CLIP"), notes.HEARTS)
    canvas.group("2. Prompt", "prompt", [encode, negative])
    right = Column(canvas, SAMPLING_X, SAMPLING_W)
    size = right.add("EmptySD3LatentImage", 150, MINIATURE_PX, MINIATURE_PX, 1, title="Picture size")
    wires: dict[str, Port] = {"model": (unet, "MODEL"), "positive": (encode, "CONDITIONING"), "negative": (negative, "CONDITIONING")}
    sampler = sample(right, 20, wires | {"latent_image": (size, "LATENT")})
    canvas.group("3. Size and sampling", "sampling", [size, sampler])
    canvas.group("4. Picture", "picture", enlarged(Column(canvas, PICTURE_X, PICTURE_W), sampler, vae, "distilled-t5/miniature"))
    return canvas.to_json()


def miniature_compare() -> Json:
    canvas = Canvas("miniature_compare", KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(notes.MINIATURE_COMPARE), "Read me", notes.MINIATURE_COMPARE)
    encoders = (("Teacher", MINIATURE_TEACHER), ("Student", MINIATURE_STUDENT))
    unet, loaders, vae = miniature_models(Column(canvas, MODELS_X, MODELS_W), *encoders)
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    prompt = middle.add("PrimitiveStringMultiline", 220, notes.SIGN, title="Prompt for both")
    seed = middle.add("PrimitiveInt", 110, 42, "fixed", title="Seed for both")
    size = middle.add("EmptySD3LatentImage", 150, MINIATURE_PX, MINIATURE_PX, 1, title="Size for both")
    canvas.group("2. The same for both", "prompt", [prompt, seed, size])
    shared: dict[str, Port] = {"model": (unet, "MODEL"), "latent_image": (size, "LATENT"), "seed": (seed, "INT")}
    for (title, _), colour, loader, x in zip(encoders, ("control", "sampling"), loaders, (SAMPLING_X, 1640), strict=True):
        lane = Column(canvas, x, PICTURE_W)
        wires: dict[str, Port] = {"clip": (loader, "CLIP"), "text": (prompt, "STRING")}
        encode = lane.add("DistilledT5TextEncode", 280, "", 3.5, inputs=wires, **OUR_LOOK)
        negative = lane.add("ConditioningZeroOut", 60, inputs={"conditioning": (encode, "CONDITIONING")}, title="Empty negative")
        sampler = sample(lane, 20, shared | {"positive": (encode, "CONDITIONING"), "negative": (negative, "CONDITIONING")})
        saved = enlarged(lane, sampler, vae, f"distilled-t5/{title.lower()}")
        canvas.group(f"3. {title}", colour, [encode, negative, sampler, *saved])
    return canvas.to_json()


def blueprint() -> Json:
    """A subgraph that the node library offers: a prompt in, Flux conditionings out."""
    canvas = Canvas(BLUEPRINT_NAME, KINDS)
    loader = Column(canvas, 0, MODELS_W).add("DistilledT5Loader", 250, *LOADER_VALUES, models=models(*LOADER_VALUES[:2]), **OUR_LOOK)
    encode, negative = encode_with_ours(Column(canvas, PROMPT_X, PROMPT_W), (loader, "CLIP"), notes.FOX)
    exposed = [(encode, "text"), (encode, "guidance"), (loader, "clip_name1"), (loader, "clip_name2")]
    given = {"positive": (encode, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "CLIP": (loader, "CLIP")}
    return wrap(canvas, exposed, given | {"token_count": (encode, "token_count"), "info": (loader, "info")})


WORKFLOWS: dict[str, Callable[[], Json]] = {
    "flux-dev": flux_dev,
    "flux-schnell": flux_schnell,
    "flux-dev-lora": flux_dev_lora,
    "flux-dev-controlnet": flux_dev_controlnet,
    "t5xxl-vs-distilled": t5xxl_vs_distilled,
    "save-a-copy": save_a_copy,
    "flux-dev-app": flux_dev_app,
    "miniature": miniature,
    "miniature_compare": miniature_compare,
    **evaluation_workflows.WORKFLOWS,
}


def files(root: Path) -> dict[Path, str]:
    """Every file that this module writes, with its text."""
    made = {root / "example_workflows" / f"{name}.json": build() for name, build in WORKFLOWS.items()}
    made[root / "subgraphs" / f"{BLUEPRINT_NAME}.json"] = blueprint()
    return {path: json.dumps(workflow, indent=2) + "\n" for path, workflow in made.items()}


def main() -> None:
    """Write all files and say so."""
    for path, text in files(ROOT).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
