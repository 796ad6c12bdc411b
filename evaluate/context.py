"""What an evaluation works on, for everything that generates, judges, measures and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.files import check_guidance, open_diffusion_model, use_one_thread_if_small
from ..diffusion.vae import load_vae
from ..families import FAMILIES
from ..runtime.comfyui import model_file
from . import provenance
from .encoders import EncoderFile, LoadedEncoder, check_encoders, find_encoders
from .generate import ImageGenerator
from .judges import check_counts
from .processes import Processes
from .questions import Question, questions_sha256, read_questions
from .scores import Kept
from .store import ImageFolder
from .suite import Suite


@dataclass(frozen=True)
class Evaluation:
    """The suite, its folder, the processes, the prompts, the encoders (the teacher first), what generates images, and what decides them."""

    suite: Suite
    out: Path
    processes: Processes
    questions: dict[str, list[Question]]
    encoders: list[EncoderFile]
    generator: ImageGenerator
    generated_by: dict[str, str]

    @property
    def teacher(self) -> EncoderFile:
        return self.encoders[0]

    @property
    def students(self) -> list[EncoderFile]:
        return self.encoders[1:]

    @property
    def device(self) -> str:
        """Where networks run."""
        return str(self.generator.model.device)

    @property
    def kept(self) -> Kept:
        """Numbers that are measured once."""
        return Kept(self.out / "scores", provenance.sources_sha256())

    def images(self, encoder: EncoderFile, task: str) -> ImageFolder:
        """An encoder's images of a task."""
        return ImageFolder(self.out / "images" / encoder.name / task)

    def load(self, encoder: EncoderFile) -> LoadedEncoder:
        """The encoder in ComfyUI."""
        return LoadedEncoder.load(encoder, self.generator.model.family, self.suite.sampling.negative_prompt)

    def made_of(self, encoder: EncoderFile, questions: Sequence[Question]) -> dict[str, str]:
        """Everything that decides an encoder's images for these questions."""
        return {**encoder.made_of(), **self.generated_by, "prompts and seeds": questions_sha256(questions)}


def open_evaluation(suite: Suite, students: Sequence[str], out: Path, processes: Processes) -> Evaluation:
    """Read prompts, find and check encoders, load diffusion model and VAE. Raises ValueError for what is missing or does not fit."""
    questions = read_questions({task.name: task.prompts for task in suite.tasks}, suite.seed)
    check_counts(suite, questions)
    encoders = find_encoders(suite, students)
    part, family = suite.diffusion_model, FAMILIES[suite.diffusion_model.family]
    file, vae = model_file(part.file, "diffusion_models"), model_file(part.vae, "vae")
    model = open_diffusion_model(file, part.dtype, family, exact_gradients=False)
    use_one_thread_if_small(model)
    guidance = suite.sampling.guidance
    check_guidance(file.name, model, () if guidance is None else (guidance,))
    check_encoders(encoders, model.text_width, file.name, family)
    generated_by = {
        "diffusion model": provenance.fingerprint(file),
        "its weights held in": part.dtype,
        "vae": provenance.fingerprint(vae),
        "sampling": str(suite.sampling),
        **provenance.computed_with(),
    }
    return Evaluation(suite, out, processes, questions, encoders, ImageGenerator(model, load_vae(vae), suite.sampling), generated_by)
