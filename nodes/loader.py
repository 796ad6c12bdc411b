"""Distilled Text Encoder Loader."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..encoder.companions import in_order, taken_by
from ..encoder.served import ServingOptions, load_encoder
from ..families import DEFAULT, FAMILIES
from ..runtime.comfyui import NO_FILE
from ..runtime.weights import CHOICES
from .model_files import FOLDER, choice_of, clip_l_names, fingerprint, path_of, text_encoder_names
from .progress import progress_bar

DTYPES = {"auto": None, **CHOICES}
MAX_TOKEN_LENGTH = 1024
COUNTED_DEVICES = ("cuda", "xpu", "npu", "mlu")


class DistilledT5Loader(io.ComfyNode):
    """Loads a distilled or trimmed text encoder in the place of ComfyUI's own CLIP loaders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5Loader",
            display_name="Distilled Text Encoder Loader",
            category="Distilled T5",
            description=(
                "Loads a distilled T5 (T5-Base: 0.26 GB) in the place of T5-XXL (9.5 GB) for Flux, Stable Diffusion 3, PixArt and Chroma, "
                "or a distilled or trimmed Qwen3 in the place of Qwen3-4B or 8B for Z-Image and FLUX.2 klein. "
                "Use it in place of Load CLIP, DualCLIPLoader or TripleCLIPLoader: "
                "the CLIP it gives works with every text encode, LoRA, ControlNet and guidance node."
            ),
            search_aliases=[
                "Distilled T5 Loader",
                "DistillT5",
                "DistilT5",
                "T5-Base dual clip",
                "small T5",
                "DualCLIPLoader",
                "T5-XXL replacement",
                "DualCLIPLoaderT5Base",
                "small Qwen3",
                "Z-Image text encoder",
            ],
            inputs=[
                *_usual_inputs(),
                *_advanced_inputs(),
            ],
            outputs=[
                io.Clip.Output(
                    display_name="CLIP", tooltip="An ordinary CLIP of this type: the encoder, and its CLIP-L and CLIP-G (or zeros)."
                ),
                io.String.Output(
                    display_name="info", tooltip="What was loaded: size, parameters, memory, number format, device, token length."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip_name1: str,
        clip_name2: str,
        type: str,
        device: str = "default",
        dtype: str = "auto",
        token_length: int = 0,
        clip_name3: str = NO_FILE,
    ) -> io.NodeOutput:
        given = {"clip_l": clip_name1, "clip_g": clip_name3}
        paths = {name: None if file == NO_FILE else path_of(file) for name, file in given.items()}
        found, t5_path = in_order(paths, path_of(clip_name2))
        companions, ignored = taken_by(choice_of(type, FAMILIES, "type"), found)
        options = ServingOptions(
            family=type,
            dtype=choice_of(dtype, DTYPES),
            token_length=token_length or None,
            device=torch_device(device),
            embedding_folders=tuple(folder_paths.get_folder_paths("embeddings")),
        )
        served = load_encoder(t5_path, companions, options, progress_bar())
        info = "\n".join(filter(None, [served.info, ignored]))
        return io.NodeOutput(served.clip, info, ui=ui.PreviewText(info))

    @classmethod
    def fingerprint_inputs(cls, clip_name1: str | None, clip_name2: str | None, clip_name3: str = NO_FILE, **_settings: object) -> str:
        return "/".join([FOLDER, *map(fingerprint, (clip_name1, clip_name2, clip_name3))])


def accelerators() -> list[str]:
    """Names such as cuda:0 of the accelerators that torch sees; none when ComfyUI runs with --cpu."""
    device = comfy.model_management.get_torch_device()
    # Others (mps, DirectML) have one device, which is the default anyway.
    if device.type not in COUNTED_DEVICES:
        return []
    count = torch.get_device_module(device).device_count()
    return [f"{device.type}:{index}" for index in range(count)]


def torch_device(name: str) -> torch.device | None:
    """The device behind a choice of the list; None for `default`."""
    if name == "default":
        return None
    if name != "cpu" and name not in accelerators():
        known = ", ".join(["default", "cpu", *accelerators()])
        raise ValueError(f"There is no device {name[:80]!r} on this machine.\nWhat to do: choose one of {known}.")
    return torch.device(name)


def _usual_inputs() -> list[io.Input]:
    """What ComfyUI's own loaders have."""
    return [
        io.Combo.Input(
            "clip_name1",
            display_name="CLIP-L file",
            options=clip_l_names(),
            tooltip="The CLIP-L file (clip_l.safetensors), from models/text_encoders. 'none': its pooled vector is zeros. "
            "PixArt, Chroma, Z-Image and FLUX.2 klein do not use it.",
        ),
        io.Combo.Input(
            "clip_name2",
            display_name="Distilled encoder file",
            options=text_encoder_names(),
            tooltip="The distilled or trimmed encoder, from models/text_encoders; these come first. T5-XXL needs ComfyUI's loader.",
        ),
        io.Combo.Input(
            "type",
            options=list(FAMILIES),
            default=DEFAULT.name,
            tooltip="The kind of diffusion model that the encoder was distilled for.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    """What ComfyUI's own loaders do not have, or hide as well. New ones come last: saved workflows hold values by position."""
    return [
        io.Combo.Input(
            "device",
            options=["default", "cpu", *accelerators()],
            default="default",
            advanced=True,
            optional=True,
            tooltip="Where the encoder runs; default: ComfyUI decides. The cpu leaves graphics memory to the diffusion model.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="auto",
            advanced=True,
            optional=True,
            tooltip="Number format of the encoder's weights. auto: as in the file, at most 16 bits. fp8 halves memory, costs precision.",
        ),
        io.Int.Input(
            "token_length",
            display_name="token length",
            default=0,
            min=0,
            max=MAX_TOKEN_LENGTH,
            advanced=True,
            optional=True,
            tooltip="Tokens to which prompts are padded. 0: as trained (best). Padding affects the image: other lengths change it.",
        ),
        io.Combo.Input(
            "clip_name3",
            display_name="CLIP-G file",
            options=[NO_FILE, *text_encoder_names()],
            default=NO_FILE,
            advanced=True,
            optional=True,
            tooltip="The CLIP-G file (clip_g.safetensors), for diffusion models with one (SD3). 'none': its pooled vector is zeros.",
        ),
    ]
