"""What the example workflows are built of: the node types that they use, and the groups of nodes that they share."""

import re

from .. import __version__
from . import notes
from .canvas import Column, Json, Kind, Port, kind

OURS = {"pack": "distilled-t5", "version": __version__}

KINDS: dict[str, Kind] = {
    "UNETLoader": kind("", "unet_name:COMBO weight_dtype:COMBO", "MODEL:MODEL"),
    "VAELoader": kind("", "vae_name:COMBO", "VAE:VAE"),
    "DualCLIPLoader": kind("", "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO?", "CLIP:CLIP"),
    "LoraLoader": kind("model:MODEL clip:CLIP", "lora_name:COMBO strength_model:FLOAT strength_clip:FLOAT", "MODEL:MODEL CLIP:CLIP"),
    "ControlNetLoader": kind("", "control_net_name:COMBO", "CONTROL_NET:CONTROL_NET"),
    "CLIPTextEncode": kind("clip:CLIP", "text:STRING", "CONDITIONING:CONDITIONING"),
    "FluxGuidance": kind("conditioning:CONDITIONING", "guidance:FLOAT", "CONDITIONING:CONDITIONING"),
    "ConditioningZeroOut": kind("conditioning:CONDITIONING", "", "CONDITIONING:CONDITIONING"),
    "ControlNetApplyAdvanced": kind(
        "positive:CONDITIONING negative:CONDITIONING control_net:CONTROL_NET image:IMAGE vae:VAE?",
        "strength:FLOAT start_percent:FLOAT end_percent:FLOAT",
        "positive:CONDITIONING negative:CONDITIONING",
    ),
    "LoadImage": kind("", "image:COMBO upload:IMAGEUPLOAD", "IMAGE:IMAGE MASK:MASK"),
    "Canny": kind("image:IMAGE", "low_threshold:FLOAT high_threshold:FLOAT", "IMAGE:IMAGE"),
    "EmptySD3LatentImage": kind("", "width:INT height:INT batch_size:INT", "LATENT:LATENT"),
    "KSampler": kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
        "LATENT:LATENT",
    ),
    "ImageScale": kind("image:IMAGE", "upscale_method:COMBO width:INT height:INT crop:COMBO", "IMAGE:IMAGE"),
    "VAEDecode": kind("samples:LATENT vae:VAE", "", "IMAGE:IMAGE"),
    "SaveImage": kind("images:IMAGE", "filename_prefix:STRING", ""),
    "PreviewImage": kind("images:IMAGE", "", ""),
    "PreviewAny": kind("source:*", "", ""),
    "PrimitiveInt": kind("", "value:INT", "INT:INT"),
    "PrimitiveStringMultiline": kind("", "value:STRING", "STRING:STRING"),
    "DistilledT5Loader": kind(
        "", "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO? dtype:COMBO? token_length:INT?", "CLIP:CLIP info:STRING", **OURS
    ),
    "DistilledT5TextEncode": kind("clip:CLIP", "text:STRING guidance:FLOAT", "CONDITIONING:CONDITIONING token_count:STRING", **OURS),
    "DistilledT5Save": kind("clip:CLIP", "filename:STRING dtype:COMBO", "file:STRING", **OURS),
    "DistilledT5CommonTextPrompt": kind("", "seed:INT split:COMBO", "prompt:STRING text:STRING", **OURS),
    "DistilledT5OCRAccuracy": kind(
        "image:IMAGE", "expected:STRING reader:COMBO", "character:FLOAT word:FLOAT sentence:FLOAT IMAGE:IMAGE report:STRING", **OURS
    ),
    "DistilledT5EncoderReport": kind(
        "clip_1:CLIP clip_2:CLIP? clip_3:CLIP? clip_4:CLIP?", "prompt:STRING repeats:INT", "IMAGE:IMAGE table:STRING", **OURS
    ),
    "DistilledT5EncoderMap": kind("clip_1:CLIP clip_2:CLIP?", "prompts:STRING seed:INT", "IMAGE:IMAGE info:STRING", **OURS),
    "DistilledT5CrossAttentionMap": kind(
        "model:MODEL clip:CLIP",
        "prompt:STRING word:STRING guidance:FLOAT",
        "MODEL:MODEL CONDITIONING:CONDITIONING ATTENTION:DISTILLED_T5_ATTENTION",
        **OURS,
    ),
    "DistilledT5AttentionMapImage": kind(
        "attention:DISTILLED_T5_ATTENTION samples:LATENT image:IMAGE?",
        "step:INT opacity:FLOAT?",
        "IMAGE:IMAGE MASK:MASK info:STRING",
        **OURS,
    ),
}

LOADER_VALUES = ("clip_l.safetensors", "distilled_t5_base.safetensors", "flux", "default", "auto", 0)
MINIATURE_TEACHER, MINIATURE_STUDENT, MINIATURE_PX = "miniature_teacher.safetensors", "miniature_student_quarter.safetensors", 96
OUR_LOOK: Json = {"color": "#233", "bgcolor": "#355"}
NOTE_X, MODELS_X, PROMPT_X, SAMPLING_X, PICTURE_X = -480, 0, 440, 920, 1320
NOTE_LINE_LETTERS, LINK_TARGET = 60, re.compile(r"\(https[^)]*\)")
NOTE_W, MODELS_W, PROMPT_W, SAMPLING_W, PICTURE_W = 420, 360, 400, 320, 640


def models(*names: str) -> list[dict[str, str]]:
    """`properties.models` of a loader, by which the browser names missing files and offers them."""
    return [{"name": name, "url": notes.FILES[name].url, "directory": notes.FILES[name].folder} for name in names]


def note_height(text: str) -> int:
    """Enough for a note's text at the width of its column; the addresses behind links do not show."""
    shown = LINK_TARGET.sub("", text).splitlines()
    return 100 + 20 * sum(1 + len(line) // NOTE_LINE_LETTERS for line in shown)


def load_models(column: Column, flux: str) -> tuple[int, int, int]:
    """Flux, the distilled encoder and the VAE, in a group; returns their ids."""
    unet = column.add("UNETLoader", 110, flux, "default", models=models(flux))
    loader = column.add("DistilledT5Loader", 250, *LOADER_VALUES, models=models(*LOADER_VALUES[:2]), **OUR_LOOK)
    vae = column.add("VAELoader", 80, "ae.safetensors", models=models("ae.safetensors"))
    column.canvas.group("1. Models", "models", [unet, loader, vae])
    return unet, loader, vae


def show_info(column: Column, loader: int) -> None:
    """What the loader says that it loaded, as text in the graph."""
    column.new_group()
    shown = column.add("PreviewAny", 160, inputs={"source": (loader, "info")}, title="What was loaded")
    column.canvas.group("What was loaded", "models", [shown])


def sample(column: Column, steps: int, wires: dict[str, Port], seed: int = 42) -> int:
    """A sampler without classifier-free guidance, as Flux wants it."""
    return column.add("KSampler", 320, seed, "fixed", steps, 1.0, "euler", "simple", 1.0, inputs=wires)


def picture(column: Column, sampler: int, vae: int, prefix: str, height: int = 640) -> list[int]:
    """Decode and save; returns the ids."""
    decode = column.add("VAEDecode", 60, inputs={"samples": (sampler, "LATENT"), "vae": (vae, "VAE")})
    return [decode, column.add("SaveImage", height, prefix, inputs={"images": (decode, "IMAGE")})]


def encode_with_ours(column: Column, clip: Port, prompt: str) -> tuple[int, int]:
    """Prompt and guidance in our own node, and an empty negative; returns their ids."""
    encode = column.add("DistilledT5TextEncode", 280, prompt, 3.5, inputs={"clip": clip}, **OUR_LOOK)
    negative = column.add("ConditioningZeroOut", 60, inputs={"conditioning": (encode, "CONDITIONING")}, title="Empty negative")
    return encode, negative


def miniature_models(column: Column, *encoders: tuple[str, str]) -> tuple[int, list[int], int]:
    """The Flux and the VAE of the miniature, and encoders by title and file; returns their ids."""
    unet = column.add("UNETLoader", 110, "miniature_flux.safetensors", "default")
    loaders = [
        column.add("DistilledT5Loader", 250, "none", file, "flux", "default", "auto", 0, title=title, **OUR_LOOK)
        for title, file in encoders
    ]
    vae = column.add("VAELoader", 80, "miniature_vae.safetensors")
    column.canvas.group("1. Models, all in this pack", "models", [unet, *loaders, vae])
    return unet, loaders, vae


def enlarged(column: Column, sampler: int, vae: int, prefix: str) -> list[int]:
    """Decode, show each pixel eight times as large, save; returns the ids."""
    decode = column.add("VAEDecode", 60, inputs={"samples": (sampler, "LATENT"), "vae": (vae, "VAE")})
    values = ("nearest-exact", 8 * MINIATURE_PX, 8 * MINIATURE_PX, "disabled")
    scale = column.add("ImageScale", 170, *values, inputs={"image": (decode, "IMAGE")})
    return [decode, scale, column.add("SaveImage", 640, prefix, inputs={"images": (scale, "IMAGE")})]
