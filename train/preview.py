"""Images while training: teacher, student and their difference on fixed prompts and seeds."""

# B batch, C channels (... any number of dimensions), L text tokens, D text width

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .reports import Reports
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
        self._teacher: list[Image.Image] = []
        self._students: list[list[Image.Image]] = []

    def show(self, reports: Reports) -> None:
        """Report a contact sheet. A failure is logged by the reporter; neither success nor failure changes the run."""
        if self.vae is None or not self.workshop.ranks.is_main:
            return
        with undisturbed():
            if reports.run.image("preview", self.sheet):
                for reporter, images in zip(reports.students.values(), self._students, strict=False):
                    reporter.image("preview", lambda images=images: self._beside_teacher(images))
        # The VAE may have pushed the diffusion model off its device.
        self.workshop.load_model()

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """A row per prompt: the teacher's image and those of the students from the same noise; of one student, also the difference."""
        prompts = self.workshop.recipe.preview.prompts
        images = self._decoded(self._latents())
        self._teacher, *self._students = (images[begin : begin + len(prompts)] for begin in range(0, len(images), len(prompts)))
        if not self.workshop.learner.name:
            return self._beside_teacher(self._students[0])
        named = zip((learner.name for learner in self.workshop.learners), self._students, strict=True)
        return contact_sheet({"teacher": self._teacher, **{f"student {name}": each for name, each in named}}, prompts)

    def _beside_teacher(self, student: list[Image.Image]) -> Image.Image:
        differences = [image_difference(*pair) for pair in zip(self._teacher, student, strict=True)]
        columns = {"teacher": self._teacher, "student": student, "difference": differences}
        return contact_sheet(columns, self.workshop.recipe.preview.prompts)

    def _latents(self) -> list[Tensor]:
        """The teacher's latents [1, C, ...] of all prompts, then each student's, on the CPU."""
        workshop, batches = self.workshop, preview_batches(self.workshop.recipe)
        if self._texts is None:
            self._texts = texts_of(workshop.teacher, batches)
        starts = workshop.starts(batches, self._texts, workshop.recipe.sampling.steps)
        students: list[Position] = []
        for one in workshop.all:
            with without_dropout(one.student):
                students += [self._by_student(one.embed, start, text) for start, text in zip(starts, self._texts, strict=True)]
        noises = [batch.drawn.noise for batch in batches]
        return [self._latent(noise, start) for noise, start in zip(noises * (1 + len(workshop.all)), [*starts, *students], strict=True)]

    def _by_student(self, embed: Callable[[Tensor], Tensor], start: Position, text: TeacherText) -> Position:
        """The start with the student's text, and its own text of the empty prompt."""
        unconditional = start.unconditional
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
