"""The example workflows that measure encoders. All but the one for written text run on the miniature, without a download and on a CPU."""

from collections.abc import Callable

from . import notes
from .canvas import Canvas, Column, Json, Port
from .workflow_parts import (
    KINDS,
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
    load_models,
    miniature_models,
    note_height,
    sample,
)

BOTH = (("Teacher", MINIATURE_TEACHER), ("Student", MINIATURE_STUDENT))
# As many as the plot shows well: things and their colours, on two backgrounds.
MAP_PROMPTS = "\n".join(
    f"a {colour} {thing} {where}"
    for where in ("in the snow", "at night")
    for colour in ("red", "green", "blue", "yellow", "purple", "cyan")
    for thing in ("square", "ring", "cross", "heart", "tree")
)


def begin(name: str, note: str) -> Canvas:
    """A canvas with its note."""
    canvas = Canvas(name, KINDS)
    Column(canvas, NOTE_X, NOTE_W).note(note_height(note), "Read me", note)
    return canvas


def show(column: Column, height: int, text: Port, picture: Port, prefix: str) -> list[int]:
    """What a node says and what it draws; returns the ids."""
    said = column.add("PreviewAny", height, inputs={"source": text}, title="In words")
    return [said, column.add("SaveImage", 640, prefix, inputs={"images": picture})]


def encoders(canvas: Canvas) -> list[int]:
    """The miniature's teacher and a student of it, in a group; returns their ids."""
    column = Column(canvas, MODELS_X, MODELS_W)
    values = ("flux", "default", "auto", 0)
    loaders = [column.add("DistilledT5Loader", 250, "none", file, *values, title=title, **OUR_LOOK) for title, file in BOTH]
    canvas.group("1. Text encoders, all in this pack", "models", loaders)
    return loaders


def check_written_text() -> Json:
    """A prompt with a text, its picture, and how much of the text can be read in it."""
    canvas = begin("check-written-text", notes.CHECK_WRITTEN_TEXT)
    unet, loader, vae = load_models(Column(canvas, MODELS_X, MODELS_W), "flux1-dev.safetensors")
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    asked = middle.add("DistilledT5CommonTextPrompt", 170, 7, "fixed", "validation", **OUR_LOOK)
    wires: dict[str, Port] = {"clip": (loader, "CLIP"), "text": (asked, "prompt")}
    encode = middle.add("DistilledT5TextEncode", 280, "", 3.5, inputs=wires, **OUR_LOOK)
    negative = middle.add("ConditioningZeroOut", 60, inputs={"conditioning": (encode, "CONDITIONING")}, title="Empty negative")
    canvas.group("2. A text to write", "prompt", [asked, encode, negative])
    right = Column(canvas, SAMPLING_X, SAMPLING_W)
    size = right.add("EmptySD3LatentImage", 150, 1024, 1024, 1, title="Picture size")
    ends: dict[str, Port] = {"positive": (encode, "CONDITIONING"), "negative": (negative, "CONDITIONING")}
    sampler = sample(right, 20, ends | {"model": (unet, "MODEL"), "latent_image": (size, "LATENT")}, seed=7)
    decode = right.add("VAEDecode", 60, inputs={"samples": (sampler, "LATENT"), "vae": (vae, "VAE")})
    canvas.group("3. Size and sampling", "sampling", [size, sampler, decode])
    last = Column(canvas, PICTURE_X, PICTURE_W)
    read: dict[str, Port] = {"image": (decode, "IMAGE"), "expected": (asked, "text")}
    ocr = last.add("DistilledT5OCRAccuracy", 560, "", "easyocr", inputs=read, **OUR_LOOK)
    shown = show(last, 200, (ocr, "report"), (ocr, "IMAGE"), "distilled-t5/check-written-text")
    canvas.group("4. What can be read", "picture", [ocr, *shown])
    return canvas.to_json()


def attention_map() -> Json:
    """Where the little Flux looks at a word."""
    canvas = begin("attention-map", notes.ATTENTION_MAP)
    unet, [loader], vae = miniature_models(Column(canvas, MODELS_X, MODELS_W), ("Teacher", MINIATURE_TEACHER))
    middle = Column(canvas, PROMPT_X, PROMPT_W)
    wires: dict[str, Port] = {"model": (unet, "MODEL"), "clip": (loader, "CLIP")}
    record = middle.add("DistilledT5CrossAttentionMap", 330, notes.HEARTS, "heart", 3.5, inputs=wires, **OUR_LOOK)
    positive: Port = (record, "CONDITIONING")
    negative = middle.add("ConditioningZeroOut", 60, inputs={"conditioning": positive}, title="Empty negative")
    canvas.group("2. Prompt and word", "prompt", [record, negative])
    right = Column(canvas, SAMPLING_X, SAMPLING_W)
    size = right.add("EmptySD3LatentImage", 150, MINIATURE_PX, MINIATURE_PX, 1, title="Picture size")
    ends: dict[str, Port] = {"positive": positive, "negative": (negative, "CONDITIONING")}
    sampler = sample(right, 20, ends | {"model": (record, "MODEL"), "latent_image": (size, "LATENT")})
    decode = right.add("VAEDecode", 60, inputs={"samples": (sampler, "LATENT"), "vae": (vae, "VAE")})
    enlarge = ("nearest-exact", 8 * MINIATURE_PX, 8 * MINIATURE_PX, "disabled")
    scale = right.add("ImageScale", 170, *enlarge, inputs={"image": (decode, "IMAGE")})
    canvas.group("3. Size and sampling", "sampling", [size, sampler, decode, scale])
    last = Column(canvas, PICTURE_X, PICTURE_W)
    behind: dict[str, Port] = {"attention": (record, "ATTENTION"), "samples": (sampler, "LATENT"), "image": (scale, "IMAGE")}
    drawn = last.add("DistilledT5AttentionMapImage", 640, 0, 0.6, inputs=behind, **OUR_LOOK)
    shown = show(last, 160, (drawn, "info"), (drawn, "IMAGE"), "distilled-t5/attention-map")
    canvas.group("4. Where Flux looks", "picture", [drawn, *shown])
    return canvas.to_json()


def encoder_report() -> Json:
    """What two encoders cost."""
    canvas = begin("encoder-report", notes.ENCODER_REPORT)
    one, other = encoders(canvas)
    right = Column(canvas, PROMPT_X, PICTURE_W)
    wires: dict[str, Port] = {"clip_1": (one, "CLIP"), "clip_2": (other, "CLIP")}
    report = right.add("DistilledT5EncoderReport", 480, notes.HEARTS, 3, inputs=wires, **OUR_LOOK)
    shown = show(right, 260, (report, "table"), (report, "IMAGE"), "distilled-t5/encoder-report")
    canvas.group("2. What they cost", "picture", [report, *shown])
    return canvas.to_json()


def encoder_map() -> Json:
    """Where prompts lie for two encoders."""
    canvas = begin("encoder-map", notes.ENCODER_MAP)
    one, other = encoders(canvas)
    right = Column(canvas, PROMPT_X, PICTURE_W)
    wires: dict[str, Port] = {"clip_1": (one, "CLIP"), "clip_2": (other, "CLIP")}
    drawn = right.add("DistilledT5EncoderMap", 760, MAP_PROMPTS, 0, "fixed", inputs=wires, **OUR_LOOK)
    shown = show(right, 160, (drawn, "info"), (drawn, "IMAGE"), "distilled-t5/encoder-map")
    canvas.group("2. The map", "picture", [drawn, *shown])
    return canvas.to_json()


WORKFLOWS: dict[str, Callable[[], Json]] = {
    "check-written-text": check_written_text,
    "attention-map": attention_map,
    "encoder-report": encoder_report,
    "encoder-map": encoder_map,
}
