"""Empty and negative prompts, which a student also encodes where images are sampled with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

# Half of the replacements are empty, the others are what people write to keep faults out of images.
NEGATIVES = (
    "low quality",
    "worst quality, low quality, blurry",
    "blurry, out of focus, jpeg artifacts",
    "watermark, signature, text, logo",
    "bad anatomy, extra fingers, missing limbs",
    "deformed hands, mutated, disfigured",
    "cropped, cut off, duplicate",
    "overexposed, underexposed, low contrast",
    "cartoon, painting, illustration, 3d render",
    "ugly, grainy, noisy",
)


def some_replaced(prompts: Sequence[str], share: float, seed: int, batch: int) -> tuple[str, ...]:
    """The prompts of a batch, a share of them replaced by empty and negative ones: a pure function of its arguments."""
    random = Random(f"negatives {seed} {batch}")
    return tuple(_negative(random) if random.random() < share else prompt for prompt in prompts)


def _negative(random: Random) -> str:
    return "" if random.random() < 0.5 else random.choice(NEGATIVES)
