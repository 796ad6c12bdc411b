"""Cross-Attention Map: where in the image the model attends to a word of the prompt; one node before the sampler, one after it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..encoder.conditioning import encoded
from ..evaluate.attention import enlarged, overlaid, stretched, t5_pieces, word_positions
from ..evaluate.attention_recorder import AttentionRecorder, followed_family, map_of, recording_model
from ..families import DEFAULT
from .show import shown

Attention = io.Custom("DISTILLED_T5_ATTENTION")
MAX_STEPS = 10_000


class DistilledT5CrossAttentionMap(io.ComfyNode):
    """Prepares a diffusion model so that it records what it attends to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5CrossAttentionMap",
            display_name="Distilled T5 Cross-Attention Map",
            category="Distilled T5",
            description=(
                "Records, while Flux, Stable Diffusion 3, PixArt or Chroma samples, how much each part of the image attends to a word of "
                "the prompt. The image stays the same to the bit. Behind the sampler, Distilled T5 Attention Map Image shows it."
            ),
            search_aliases=["attention map", "attention heatmap", "DAAM", "word heatmap", "where does Flux look"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux, Stable Diffusion 3, PixArt or Chroma model, after LoRA nodes."),
                io.Clip.Input(
                    "clip", tooltip="The CLIP that encodes the prompt: of Distilled Text Encoder Loader, or of ComfyUI's own with T5-XXL."
                ),
                io.String.Input("prompt", multiline=True, tooltip="The prompt. It is encoded here, so it and the map cannot differ."),
                io.String.Input("word", default="", tooltip="A word of the prompt, or several in a row. Every occurrence counts."),
                io.Float.Input(
                    "guidance",
                    default=DEFAULT.default_guidance,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of Flux-dev: 2 to 5. Other models take none and ignore it.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model that records: connect the sampler here."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The encoded prompt: the sampler's positive input."),
                Attention.Output(display_name="ATTENTION", tooltip="What is recorded, for Distilled T5 Attention Map Image."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, prompt: str, word: str, guidance: float) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "There is no CLIP.\nWhat to do: connect a Distilled Text Encoder Loader; a checkpoint without text encoders gives none."
            )
        positions, family = word_positions(clip, prompt, word), followed_family(model)
        extras = {"guidance": guidance} if family.takes_guidance(model.model) else {}
        conditioning = encoded(clip, clip.tokenize(prompt), **extras)
        # The rows of CLIP-L and CLIP-G, if any, stand before T5's.
        before = conditioning[0][0].shape[1] - len(t5_pieces(clip, prompt))
        recorder = AttentionRecorder(family, word, [before + place for place in positions], [embedding for embedding, _ in conditioning])
        return io.NodeOutput(recording_model(model, recorder), conditioning, recorder)


class DistilledT5AttentionMapImage(io.ComfyNode):
    """Shows what a sampling has recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5AttentionMapImage",
            display_name="Distilled T5 Attention Map Image",
            category="Distilled T5",
            description=(
                "Shows the attention that Distilled T5 Cross-Attention Map recorded, as a heat map over the image: mean over all heads "
                "and blocks, at one step or over all. Another step needs no new sampling."
            ),
            search_aliases=["attention map", "attention heatmap", "heat map image", "show attention"],
            is_output_node=True,
            inputs=[
                Attention.Input("attention", tooltip="Of Distilled T5 Cross-Attention Map."),
                io.Latent.Input("samples", tooltip="The sampler's LATENT output: it identifies the sampling."),
                io.Int.Input("step", default=0, min=0, max=MAX_STEPS, tooltip="The sampling step, from 1. 0: the mean of all steps."),
                io.Image.Input("image", optional=True, tooltip="The decoded image under the map. Without it: the map alone."),
                io.Float.Input(
                    "opacity",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Opacity of the map over the image: 0 none, 1 full.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The heat map: yellow where attention to the word is greatest."),
                io.Mask.Output(display_name="MASK", tooltip="The same map as a mask: 0 where attention is least, 1 where it is greatest."),
                io.String.Output(display_name="info", tooltip="Word, tokens, steps, and the least and greatest share of attention."),
            ],
        )

    @classmethod
    def execute(cls, attention: AttentionRecorder, samples: Any, step: int, image: Any = None, opacity: float = 0.6) -> io.NodeOutput:
        latent_NCHW = samples["samples"]
        run = attention.run_of(latent_NCHW)
        map_NHW = map_of(run, step)
        height_px, width_px = (DEFAULT.cell_px * cells for cells in latent_NCHW.shape[-2:]) if image is None else image.shape[1:3]
        if image is not None and len(image) != len(map_NHW):
            raise ValueError(
                f"Expected one image per sampled latent: got {len(image)} images and {len(map_NHW)} latents.\n"
                "What to do: connect the complete decoded LATENT."
            )
        mask_NHW = enlarged(stretched(map_NHW), height_px, width_px)
        when = f"step {step} of {run.steps}" if step else f"mean of {run.steps} steps"
        info = (
            f"attention to {attention.word.strip()!r} ({len(attention.positions)} T5 tokens), {when}, {len(map_NHW)} images: "
            f"{100 * float(map_NHW.min()):.3g} % to {100 * float(map_NHW.max()):.3g} % of each image token's attention"
        )
        drawn = overlaid(mask_NHW, image, opacity)
        return io.NodeOutput(drawn, mask_NHW, info, ui=shown(drawn, info, cls))
