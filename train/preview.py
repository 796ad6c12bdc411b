"""Images while training: teacher, student and their difference on fixed prompts and seeds."""

# B batch, C channels (... any number of dimensions), L text tokens, D text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.denoise import denoise
from ..diffusion.vae import load_vae
from ..encoder.teacher_text import TeacherText
from ..runtime.randomness import undisturbed
from .batches import preview_batches
from .contact_sheet import contact_sheet, image_difference
from .models import preview_vae
from .report import Reporter
from .teacher_chunks import texts_of
from .trajectory import Position
from .validation import without_dropout
from .workshop import Workshop

if TYPE_CHECKING:
    from PIL import Image


class Previewer:
    """Makes contact sheets if the recipe names a VAE. The teacher encodes the prompts once; its texts stay in RAM."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.vae = preview_vae(workshop.recipe)
        self._texts: list[TeacherText] | None = None

    def show(self, reporter: Reporter) -> None:
        """Report a contact sheet. A failure is logged by the reporter; neither success nor failure changes the run."""
        if self.vae is None or not self.workshop.ranks.is_main:
            return
        with undisturbed():
            reporter.image("preview", self.sheet)
        # The VAE may have pushed the diffusion model off its device.
        self.workshop.load_model()

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """A row per prompt: the teacher's image, the student's from the same noise, their difference."""
        prompts = self.workshop.recipe.preview.prompts
        images = self._decoded(self._latents())
        teacher, student = images[: len(prompts)], images[len(prompts) :]
        differences = [image_difference(*pair) for pair in zip(teacher, student, strict=True)]
        return contact_sheet(teacher, student, differences, prompts)

    def _latents(self) -> list[Tensor]:
        """The teacher's latents [1, C, ...] of all prompts, then the student's, on the CPU."""
        workshop, batches = self.workshop, preview_batches(self.workshop.recipe)
        if self._texts is None:
            self._texts = texts_of(workshop.teacher, batches)
        starts = workshop.starts(batches, self._texts, workshop.recipe.sampling.steps)
        with without_dropout(workshop.student):
            students = [self._by_student(start, text) for start, text in zip(starts, self._texts, strict=True)]
        noises = [batch.drawn.noise for batch in batches]
        return [self._latent(noise, start) for noise, start in zip(noises * 2, [*starts, *students], strict=True)]

    def _by_student(self, start: Position, text: TeacherText) -> Position:
        """The start with the student's text, and its own text of the empty prompt."""
        embed, unconditional = self.workshop.embed, start.unconditional
        if text.empty is not None and unconditional is not None:
            empty = replace(text.empty, text_BLD=embed(text.empty.token_ids_BL).float().cpu())
            unconditional = (empty.whole.to(start.x), unconditional[1])
        return replace(start, text_BLD=embed(start.token_ids_BL).float(), unconditional=unconditional)

    def _latent(self, noise: Tensor, start: Position) -> Tensor:
        text_BLD, cfg = start.whole(start.text_BLD), 1.0 if start.cfg_B is None else float(start.cfg_B)
        entry = (text_BLD, start.extras, start.guidance_B)
        return denoise(self.workshop.model, noise, start.sigmas_T, *entry, cfg=cfg, negative=start.unconditional).cpu()

    def _decoded(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """Decode latents one by one. The VAE is loaded only here: it takes no memory while the student is trained."""
        from PIL import Image

        assert self.vae is not None
        vae = load_vae(self.vae)
        pixels = [vae.decode(latent)[0].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy() for latent in latents]
        return [Image.fromarray(image_HWC) for image_HWC in pixels]
