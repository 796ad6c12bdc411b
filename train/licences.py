"""Which licence a student has: it follows from the models that it was made from, known by the names of their files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..families import TRIMMABLE
from .recipe import RANDOM, STAND_IN, Recipe

HUGGING_FACE = "https://huggingface.co/"
DEV = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class Licence:
    """A licence. name: Hugging Face's, or one that it does not know, which then has a link. open: whether it allows any use."""

    name: str
    open: bool = True
    link: str = ""


APACHE = Licence("apache-2.0")
FLUX_DEV = Licence("flux-1-dev-non-commercial-license", False, f"{HUGGING_FACE}{DEV}/blob/main/LICENSE.md")
SD35 = "stabilityai/stable-diffusion-3.5-medium"
STABILITY_AI = Licence("stabilityai-ai-community", False, f"{HUGGING_FACE}{SD35}/blob/main/LICENSE.md")
RAIL = Licence("openrail++", False)
UNKNOWN = Licence("unknown", False)


@dataclass(frozen=True)
class Origin:
    """A model that a student was made from. part: what it did. repo: where it was published, if known."""

    part: str
    file: str
    licence: Licence
    repo: str = ""

    @property
    def reason(self) -> str:
        """Its licence, and how that is known, in a sentence."""
        if self.licence is UNKNOWN:
            return f"unknown: check it where you got {self.file}"
        return f"{self.licence.name}" + (f", as published in [{self.repo}]({HUGGING_FACE}{self.repo})" if self.repo else ", with this pack")


# What names of the same weights may end in: a number format, and the kind of file. Any other word may be a merge or a fine-tune.
ENDING = r"([-_.](bf16|fp16|fp32|fp8([-_]e4m3fn)?(_scaled)?))?(\.(safetensors|sft))?"
# What `train trim` adds to a name.
TRIMMED = "|".join(TRIMMABLE)
# File names as they are published, in lower case; where they come from, and under which licence.
KNOWN = (
    (r"flux1?[-_.]?(1[-_])?dev", DEV, FLUX_DEV),
    (r"flux1?[-_.]?(1[-_])?schnell", "black-forest-labs/FLUX.1-schnell", APACHE),
    (r"sd3\.5_medium", SD35, STABILITY_AI),
    (r"pixart_alpha_1024_ms", "PixArt-alpha/PixArt-XL-2-1024-MS", RAIL),
    (r"pixart_sigma_1024_ms", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", RAIL),
    (r"chroma1[-_]hd", "lodestones/Chroma1-HD", APACHE),
    (r"z_image_turbo", "Tongyi-MAI/Z-Image-Turbo", APACHE),
    (r"flux-2-klein-4b", "black-forest-labs/FLUX.2-klein-4B", APACHE),
    (rf"(qwen_3_4b|qwen3-4b)(-({TRIMMED}))?", "Qwen/Qwen3-4B", APACHE),
    (r"qwen3-0\.6b", "Qwen/Qwen3-0.6B", APACHE),
    (r"qwen3-1\.7b", "Qwen/Qwen3-1.7B", APACHE),
    (r"t5xxl|t5[-_]v1_1[-_]xxl", "google/t5-v1_1-xxl", APACHE),
    (r"(google[-_])?(?P<name>(flan-t5|t5-v1_1)-(small|base|large|xl))", "google/{name}", APACHE),
    (r"miniature_(teacher|flux|sd3|(sd3_)?student_(quarter|tenth|fortieth))", "", APACHE),
)


def origins(recipe: Recipe) -> list[Origin]:
    """The models whose weights or outputs a student of this recipe learned from; random ones are left out."""
    named = {
        "diffusion model, whose velocities it follows": recipe.diffusion_model.file,
        "teacher, whose text embeddings it replaces": recipe.teacher.t5,
        "initial weights": recipe.student.start,
    }
    return [_origin(part, Path(file).name) for part, file in named.items() if file not in (STAND_IN, RANDOM)]


def _origin(part: str, file: str) -> Origin:
    for pattern, repo, licence in KNOWN:
        if found := re.fullmatch(f"({pattern}){ENDING}", file.lower()):
            return Origin(part, file, licence, repo.format(**found.groupdict()))
    return Origin(part, file, UNKNOWN)


def licence_of(models: list[Origin]) -> Licence:
    """The strictest of their licences; unknown if one is."""
    licences = [model.licence for model in models]
    strict = [licence for licence in licences if not licence.open]
    return UNKNOWN if UNKNOWN in licences else strict[0] if strict else APACHE
