"""Pictures while training: teacher, student and their difference on fixed prompts and seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contact_sheet import contact_sheet, picture_difference
from .host import model_file
from .recipe import Recipe
from .trajectory import Position, draw

if TYPE_CHECKING:
    from PIL import Image

    from .report import Reporter
    from .run import Workshop

# Batches of previews are drawn from numbers that neither stages nor the held-out prompts reach.
PREVIEW_BASE = 1 << 30


class Previewer:
    """Makes contact sheets if the recipe names a VAE; the first one loads it."""

    def __init__(self, recipe: Recipe, workshop: Workshop) -> None:
        self.recipe, self.workshop = recipe, workshop
        self._vae: Any = None

    def show(self, reporter: Reporter) -> None:
        """Report a contact sheet; trouble is reported by the reporter and does not end the run."""
        if self.recipe.preview.vae and self.workshop.ranks.is_main:
            reporter.picture("preview", self.sheet)

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """A row per prompt: the teacher's picture, the student's from the same noise, their difference."""
        rows = [self._row(index, prompt) for index, prompt in enumerate(self.recipe.preview.prompts)]
        teacher, student, difference = zip(*rows, strict=True)
        return contact_sheet(teacher, student, difference, self.recipe.preview.prompts)

    def _row(self, index: int, prompt: str) -> tuple[Image.Image, Image.Image, Image.Image]:
        from .batches import Batch

        sampling, stage = self.recipe.sampling, self.recipe.stages[-1]
        drawn = draw(self.recipe.seed, PREVIEW_BASE + index, 1, stage.resolution_px, sampling.guidance[:1], sampling.token_lengths[:1])
        [position] = self.workshop.starts([Batch((prompt,), drawn)])
        student = self.workshop.learner.student
        student.train(False)
        text_BLD = self.workshop.learner.embed(position.token_ids_BL).float()
        student.train(True)
        pictures = [self._picture(self._sampled(position, text)) for text in (position.text_BLD, text_BLD)]
        return pictures[0], pictures[1], picture_difference(pictures[0], pictures[1])

    def _sampled(self, position: Position, text_BLD: Tensor) -> Tensor:
        """The latent at the end of the text's own trajectory."""
        x_BCHW = position.x_BCHW
        for now, after in zip(position.sigmas_T[:-1], position.sigmas_T[1:], strict=True):
            sigma_B = now.to(x_BCHW).expand(len(x_BCHW))
            velocity = self.workshop.flow.velocity(x_BCHW, sigma_B, text_BLD, position.pooled_BP, position.guidance_B)
            x_BCHW = x_BCHW + (after - now).to(x_BCHW) * velocity
        return self.workshop.flow.model.process_latent_out(x_BCHW)

    def _picture(self, latent_BCHW: Tensor) -> Image.Image:
        from PIL import Image

        pixels_HWC = self._decoder().decode(latent_BCHW.cpu())[0].clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels_HWC.cpu().numpy())

    def _decoder(self) -> Any:
        if self._vae is None:
            import comfy.sd
            import comfy.utils

            loaded, metadata = comfy.utils.load_torch_file(str(model_file(self.recipe.preview.vae, "vae")), return_metadata=True)
            self._vae = comfy.sd.VAE(sd=loaded, metadata=metadata)
        return self._vae
