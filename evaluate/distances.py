"""How far apart a student and the teacher move the diffusion model from the same seed."""

# B images, C H W latent, S steps

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.optional import needed
from ..train.trajectory import Position, VelocityModel, gaps_by_band
from .local_weights import frozen, load_file
from .pictures import checked_images

ALEXNET_SOURCE = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def latent_rms(teacher_SBCHW: Sequence[Tensor], student_SBCHW: Sequence[Tensor]) -> np.ndarray:
    """The root mean square [S, B] of the difference of two latents after each step, from the same noise, in the latent's own units.

    Raises ValueError if the runs differ in the number of steps or in the shape of the latents.
    """
    ours, theirs = ([list(latent.shape) for latent in run] for run in (student_SBCHW, teacher_SBCHW))
    if not ours or ours != theirs:
        raise ValueError(
            f"Both runs must have the same steps and sizes: the teacher's has {theirs[:3]} ({len(theirs)} steps), "
            f"the student's {ours[:3]} ({len(ours)} steps).\nWhat to do: sample both with the same settings."
        )
    pairs = zip(teacher_SBCHW, student_SBCHW, strict=True)
    rows = [(a.detach().double() - b.detach().double()).square().flatten(1).mean(dim=1).sqrt() for a, b in pairs]
    return torch.stack(rows).cpu().numpy()


def velocity_gaps(position: Position, model: VelocityModel, student: Callable[[Tensor], Tensor], bands: int) -> dict[str, list[float]]:
    """The trainer's held-out velocity gap of each prompt of a batch, from the start of its trajectory, by band of noise level."""
    steps: dict[str, list[Tensor]] = {}
    for band, [gap_B] in gaps_by_band(position, model, [student], bands):
        steps.setdefault(band, []).append(gap_B.detach().double().cpu())
    return {band: torch.stack(gaps).mean(dim=0).tolist() for band, gaps in steps.items()}


class Lpips:
    """LPIPS with AlexNet, version 0.1, by its authors' package; AlexNet's weights come from a file (Zhang et al. 2018)."""

    def __init__(self, alexnet: Path, device: str = "cpu") -> None:
        package = needed("lpips", "lpips", "LPIPS")
        tensors = load_file(alexnet, "LPIPS", ALEXNET_SOURCE)
        with torch.random.fork_rng(devices=[]):  # the package first fills the network with random numbers
            self._network = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        named = {f"features.{name.partition('.')[2]}": tensor for name, tensor in self._network.net.state_dict().items()}
        differ = [name for name, tensor in named.items() if name not in tensors or tensors[name].shape != tensor.shape]
        if differ:
            raise ValueError(
                f"{alexnet} is not torchvision's AlexNet: {', '.join(differ)} missing or of another shape.\n"
                f"What to do: use {ALEXNET_SOURCE}"
            )
        for name, tensor in named.items():
            tensor.copy_(tensors[name])
        self._network, self._device = frozen(self._network, device), device

    def distances(self, a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
        """The distance [N] of each image to its counterpart, both uint8 [N, H, W, 3]: 0 if they are equal."""
        if a_NHWC.shape != b_NHWC.shape:
            raise ValueError(
                f"LPIPS compares images of one size in pairs: got {list(a_NHWC.shape)} and {list(b_NHWC.shape)}.\n"
                "What to do: give the images of the same prompts and seeds."
            )
        a, b = (self._pixels(images) for images in (a_NHWC, b_NHWC))
        with torch.no_grad():
            return self._network(a, b).flatten().double().cpu().numpy()

    def _pixels(self, images: np.ndarray) -> Tensor:
        """Colours in -1..1 [N, 3, H, W]."""
        return torch.from_numpy(checked_images(images)).permute(0, 3, 1, 2).to(self._device).float() / 127.5 - 1
