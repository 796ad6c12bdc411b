"""Generating images: encoder by encoder, what is missing, in batches that are the same in every run."""

# B images, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import numpy as np
import torch
from torch import Tensor

from ..diffusion.denoise import Entry, OnStep, denoise
from ..diffusion.frozen import FrozenModel
from .encoders import LoadedEncoder, Text, by_length, together
from .processes import Processes
from .questions import Question
from .store import ImageFolder, missing_batches
from .suite import SuiteSamplingPart

# Prompts that an encoder encodes in a row before the diffusion model runs; held in RAM, 4.2 MB each at 256 tokens of Flux.
CHUNK_PROMPTS = 128
# As ComfyUI's Save Image writes them.
PNG_LEVEL = 4


class ImageGenerator:
    """A diffusion model and its VAE: for each prompt and seed the image that stock nodes make of it alone, many at once."""

    def __init__(self, model: FrozenModel, vae: Any, sampling: SuiteSamplingPart) -> None:
        self.model = model
        self.vae = vae
        self.sampling = sampling

    @torch.no_grad()
    def images(self, texts: Sequence[Text], seeds: Sequence[int]) -> np.ndarray:
        """Images [B, H, W, 3] from 0 to 1 of encoded prompts of one length."""
        return self.vae.decode(self.latents(texts, seeds)).float().cpu().numpy()

    def latents(self, texts: Sequence[Text], seeds: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Latents [B, C, H, W] at the end of the sampling."""
        text_BLD, pooled_BP = together(texts)
        noise = self.noise(seeds)
        self.model.load_for_sampling(noise.shape)
        sigmas_T = self.model.sigmas(self.sampling.steps)
        entry, cfg, negative = (text_BLD.to(self.model.device), self.extras(pooled_BP)), self.sampling.cfg, self.negative(texts)
        return denoise(self.model, noise, sigmas_T, *entry, on_step=on_step, cfg=cfg, negative=negative)

    def negative(self, texts: Sequence[Text]) -> Entry | None:
        """The entry of the negative prompt that belongs to some texts; None without classifier-free guidance."""
        text = texts[0].negative
        return None if text is None else (text.text_1LD.to(self.model.device), self.extras(text.pooled_1P))

    def extras(self, pooled_BP: Tensor) -> dict[str, Any]:
        """What stands beside the text in a conditioning entry."""
        extras: dict[str, Any] = {"pooled_output": pooled_BP.to(self.model.device) if pooled_BP.shape[-1] else None}
        return extras if self.sampling.guidance is None else {**extras, "guidance": self.sampling.guidance}

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise [B, C, H, W] that the stock KSampler starts from at each seed."""
        empty = torch.zeros(1, *self.model.family.latent_shape(self.sampling.resolution_px))
        return torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])


@dataclass(frozen=True)
class MissingImages:
    """A batch of images that are missing, and their folder."""

    folder: ImageFolder
    questions: list[Question]


def missing_images(
    folders: Mapping[str, ImageFolder], questions: Mapping[str, list[Question]], size: int, processes: Processes
) -> list[MissingImages]:
    """This process's share of the missing batches of all tasks. Rank 0 looks, so that all agree."""
    ranks = processes.ranks
    found = {task: missing_batches(len(asked), folders[task].present(), size) for task, asked in questions.items()} if ranks.is_main else {}
    missing = [(task, batch) for task, indices in ranks.share(found).items() for batch in indices]
    return [MissingImages(folders[task], [questions[task][index] for index in batch]) for task, batch in missing[ranks.rank :: ranks.world]]


def generate_all(
    generator: ImageGenerator, load: Callable[[], LoadedEncoder], missing: Sequence[MissingImages], processes: Processes
) -> bool:
    """Generate the batches; whether all are done, or a signal asked to leave. The encoder is loaded if anything is missing."""
    if not missing or processes.stop():
        return not missing
    encoder = load()
    at_once = max(1, CHUNK_PROMPTS // generator.sampling.batch)
    for chunk in (missing[start : start + at_once] for start in range(0, len(missing), at_once)):
        texts = [[encoder.text(question.prompt) for question in batch.questions] for batch in chunk]
        for batch, texts_of_batch in zip(chunk, texts, strict=True):
            if processes.stop():
                return False
            batch.folder.add(_png_files(generator, batch.questions, texts_of_batch))
            processes.advance(len(batch.questions))
    return True


def _png_files(generator: ImageGenerator, questions: Sequence[Question], texts: Sequence[Text]) -> dict[int, bytes]:
    """The PNG files of a batch by index."""
    files: dict[int, bytes] = {}
    for places in by_length(texts):
        group = [questions[place] for place in places]
        images = generator.images([texts[place] for place in places], [question.seed for question in group])
        files |= {question.index: png(image, question) for question, image in zip(group, images, strict=True)}
    return files


def png(image: np.ndarray, question: Question) -> bytes:
    """An image [H, W, 3] from 0 to 1 as ComfyUI's Save Image writes it, with prompt and seed as its text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", question.prompt)
    info.add_text("seed", str(question.seed))
    content = io.BytesIO()
    Image.fromarray(np.clip(255.0 * image, 0, 255).astype(np.uint8)).save(content, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return content.getvalue()
