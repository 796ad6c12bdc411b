"""How far a student leads the diffusion model away from where the teacher leads it, from the same seed."""

# B pictures, C H W latent, S steps

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
SIGMA_BANDS = 4


def latent_rms(teacher_SBCHW: Sequence[Tensor], student_SBCHW: Sequence[Tensor]) -> np.ndarray:
    """The root mean square [S,B], in the latent's own units, of the difference of two latents after each step, from the same noise.

    Raises ValueError if the two runs have not as many steps, or latents of other shapes.
    """
    ours, theirs = ([list(latent.shape) for latent in run] for run in (student_SBCHW, teacher_SBCHW))
    if not ours or ours != theirs:
        raise ValueError(
            f"Both runs must have the same steps and sizes; the teacher's has {theirs[:3]} ({len(theirs)} steps), "
            f"the student's {ours[:3]} ({len(ours)} steps).\nWhat to do: sample both with the same settings."
        )
    pairs = zip(teacher_SBCHW, student_SBCHW, strict=True)
    rows = [(a.detach().double() - b.detach().double()).square().flatten(1).mean(dim=1).sqrt() for a, b in pairs]
    return torch.stack(rows).cpu().numpy()


def velocity_gaps(
    position: Position, flow: VelocityModel, student: Callable[[Tensor], Tensor], bands: int = SIGMA_BANDS
) -> dict[str, list[float]]:
    """The trainer's held-out velocity gap of each prompt of a batch, from the start of its trajectory, by band of noise level."""
    steps: dict[str, list[Tensor]] = {}
    for band, gap_B in gaps_by_band(position, flow, student, bands):
        steps.setdefault(band, []).append(gap_B.detach().double().cpu())
    return {band: torch.stack(gaps).mean(dim=0).tolist() for band, gaps in steps.items()}


class Lpips:
    """LPIPS with AlexNet, version 0.1, by its authors' package; AlexNet's weights come from a file (Zhang et al. 2018)."""

    def __init__(self, alexnet: Path, device: str = "cpu") -> None:
        package = needed("lpips", "lpips", "LPIPS")
        tensors = load_file(alexnet, "LPIPS", ALEXNET_SOURCE)
        with torch.random.fork_rng(devices=[]):  # the package first fills the network by chance
            self._network = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        named = {f"features.{name.partition('.')[2]}": tensor for name, tensor in self._network.net.state_dict().items()}
        differ = [name for name, tensor in named.items() if name not in tensors or tensors[name].shape != tensor.shape]
        if differ:
            raise ValueError(
                f"{alexnet} is no AlexNet of torchvision: {', '.join(differ)} missing or of another shape.\n"
                f"What to do: use {ALEXNET_SOURCE}"
            )
        for name, tensor in named.items():
            tensor.copy_(tensors[name])
        self._network, self._device = frozen(self._network, device), device

    def distances(self, a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
        """The distance [N] of each picture to its counterpart, both uint8 [N,H,W,3]: 0 if they are equal."""
        if a_NHWC.shape != b_NHWC.shape:
            raise ValueError(
                f"LPIPS compares pictures of one size, one by one; {list(a_NHWC.shape)} and {list(b_NHWC.shape)} came.\n"
                "What to do: give the pictures of the same prompts and seeds."
            )
        a, b = (self._pixels(pictures) for pictures in (a_NHWC, b_NHWC))
        with torch.no_grad():
            return self._network(a, b).flatten().double().cpu().numpy()

    def _pixels(self, pictures: np.ndarray) -> Tensor:
        """Colours in -1..1 [N,3,H,W]."""
        return torch.from_numpy(checked_images(pictures)).permute(0, 3, 1, 2).to(self._device).float() / 127.5 - 1
