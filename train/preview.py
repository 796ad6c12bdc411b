"""Pictures while training: teacher, student and their difference on fixed prompts and seeds."""

# B batch, C H W latent, L text tokens, D text width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..runtime.comfyui import model_file
from ..runtime.randomness import undisturbed
from .batches import Batch
from .contact_sheet import contact_sheet, picture_difference
from .models import metadata_of
from .recipe import Recipe
from .trajectory import Position, draw
from .validation import without_dropout

if TYPE_CHECKING:
    from PIL import Image

    from ..encoder.teacher import TeacherText
    from .report import Reporter
    from .run import Workshop

# Batches of previews are drawn from numbers that neither stages nor the held-out prompts reach.
PREVIEW_BASE = 1 << 30
# What Flux.1-dev's authors and ComfyUI's FluxGuidance node propose.
USUAL_GUIDANCE = 3.5


def vae_file(recipe: Recipe) -> Path | None:
    """The VAE of the previews; None if the recipe wants none. Raises ValueError if it is not there."""
    return model_file(recipe.preview.vae, "vae") if recipe.preview.vae else None


def preview_batches(recipe: Recipe) -> list[Batch]:
    """Each prompt by itself, at the last stage's size, the token length the student is served at, and the usual guidance."""
    length, guidance = metadata_of(recipe, 0).token_length, usual_guidance(recipe.sampling.guidance)
    side_px = recipe.stages[-1].resolution_px
    return [
        Batch((prompt,), draw(recipe.seed, PREVIEW_BASE + index, 1, side_px, guidance, (length,)))
        for index, prompt in enumerate(recipe.preview.prompts)
    ]


def usual_guidance(trained_at: Sequence[float]) -> tuple[float, ...]:
    """3.5 if the student is trained at it, else the middle one of what it is trained at; nothing for models without guidance."""
    if not trained_at or USUAL_GUIDANCE in trained_at:
        return (USUAL_GUIDANCE,) if trained_at else ()
    return (sorted(trained_at)[len(trained_at) // 2],)


class Previewer:
    """Makes contact sheets if the recipe names a VAE. The teacher encodes the prompts once; its texts stay in RAM."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.vae = vae_file(workshop.recipe)
        self._texts: list[TeacherText] | None = None

    def show(self, reporter: Reporter) -> None:
        """Report a contact sheet; trouble is reported by the reporter and does not end the run, nor does any of it change the run."""
        if self.vae is None or not self.workshop.ranks.is_main:
            return
        with undisturbed():
            reporter.picture("preview", self.sheet)
        # The VAE, which is gone by now, may have pushed it off its device.
        self.workshop.load_flow()

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """A row per prompt: the teacher's picture, the student's from the same noise, their difference."""
        prompts = self.workshop.recipe.preview.prompts
        pictures = self._pictures(self._latents())
        teacher, student = pictures[: len(prompts)], pictures[len(prompts) :]
        differences = [picture_difference(*pair) for pair in zip(teacher, student, strict=True)]
        return contact_sheet(teacher, student, differences, prompts)

    def _latents(self) -> list[Tensor]:
        """The teacher's latents [1, C, H, W] of all prompts, then the student's, on the CPU."""
        workshop, batches = self.workshop, preview_batches(self.workshop.recipe)
        if self._texts is None:
            self._texts = workshop.teacher.texts((batch.prompts, batch.drawn.token_length) for batch in batches)
        positions = workshop.starts(batches, self._texts)
        with without_dropout(workshop.student):
            spoken = [workshop.embed(position.token_ids_BL).float() for position in positions]
        texts = [*(position.text_BLD for position in positions), *spoken]
        return [self._sampled(position, text_BLD) for position, text_BLD in zip(positions * 2, texts, strict=True)]

    def _sampled(self, position: Position, text_BLD: Tensor) -> Tensor:
        """The latent at the end of the text's own trajectory."""
        x_BCHW = position.x_BCHW
        for now, after in zip(position.sigmas_T[:-1], position.sigmas_T[1:], strict=True):
            sigma_B = now.to(x_BCHW).expand(len(x_BCHW))
            velocity = self.workshop.flow.velocity(x_BCHW, sigma_B, text_BLD, position.pooled_BP, position.guidance_B)
            x_BCHW = x_BCHW + (after - now).to(x_BCHW) * velocity
        return self.workshop.flow.model.process_latent_out(x_BCHW).cpu()

    def _pictures(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """Decode latents one by one. The VAE lives only here: it takes no memory while the student is trained."""
        from PIL import Image

        tensors, metadata = comfy.utils.load_torch_file(str(self.vae), return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        pixels = [vae.decode(latent_BCHW)[0].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy() for latent_BCHW in latents]
        return [Image.fromarray(picture_HWC) for picture_HWC in pixels]
