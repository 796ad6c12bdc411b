"""How good sets of pictures are: FID against a reference set, and CLIP score against their prompts."""

# N pictures, H W pixels, D features

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.optional import needed
from .local_weights import frozen, load_file, load_folder, load_processor

INCEPTION_FEATURES = "2048"
PUBLISHED = "FID"
# The Inception of the FID's authors as torch-fidelity, pytorch-fid and torchmetrics read it; its SHA-256 begins as its name ends.
INCEPTION_SHA256 = "6726825d"
INCEPTION_SOURCE = (
    f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth, https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
)
CLIP_SOURCE = "https://huggingface.co/openai/clip-vit-base-patch32 (config, tokenizer and preprocessor files, and model.safetensors)"
FID_RESAMPLES = 20


@dataclass(frozen=True)
class Fid:
    """A Frechet distance of n pictures to n_reference ones, and the standard deviation of that of resampled sets.

    Few pictures give too high a distance, so compare only distances over the same n.
    """

    value: float
    n: int
    n_reference: int
    deviation: float


class Inception:
    """The network whose features the FID compares, by torch-fidelity, with weights from a file."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        extractors = needed("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "FID")
        self.metric_name = metric_name(weights)
        # torch-fidelity reads only what torch.save wrote, and would run code in it: the published file has none, others are rewritten.
        source: Any = str(weights)
        if self.metric_name != PUBLISHED:
            source = io.BytesIO()
            torch.save(load_file(weights, "FID", INCEPTION_SOURCE), source)
            source.seek(0)
        try:
            network = extractors.FeatureExtractorInceptionV3("inception", [INCEPTION_FEATURES], feature_extractor_weights_path=source)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise ValueError(f"{weights} is no Inception of torch-fidelity: {said}\nWhat to do: use {INCEPTION_SOURCE}") from error
        self._network, self._device = frozen(network, device), device

    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, 2048], float64, of RGB pictures of one size, uint8 [N,H,W,3]."""
        images = torch.from_numpy(checked_images(images_NHWC)).permute(0, 3, 1, 2).to(self._device)
        with torch.no_grad():
            [features_ND] = self._network(images)
        return features_ND.double().cpu().numpy()


def metric_name(inception: Path) -> str:
    """FID; with weights that are not the published ones, which give other numbers, the name says so."""
    content = inception.read_bytes() if inception.is_file() else b""
    return PUBLISHED if hashlib.sha256(content).hexdigest().startswith(INCEPTION_SHA256) else "FID (other Inception)"


def checked_images(images_NHWC: np.ndarray) -> np.ndarray:
    """The pictures, in one piece of memory. Raises ValueError if they are not uint8 [N,H,W,3]."""
    if images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3 or images_NHWC.dtype != np.uint8 or not images_NHWC.size:
        raise ValueError(
            f"RGB pictures of one size were expected, uint8 [N, height, width, 3]; {images_NHWC.dtype} {list(images_NHWC.shape)} came.\n"
            "What to do: stack pictures of one size, without alpha channels, and scale their values to 0..255."
        )
    return np.ascontiguousarray(images_NHWC)


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """The Frechet distance of the normal distributions with the means and covariances of two sets of features (Heusel et al. 2017).

    The trace of the root of the covariances' product is the sum of the singular values of the product of the centred sets: that is exact
    where there are fewer pictures than features and a root of the matrix is not. Raises ValueError for fewer than two features a set.
    """
    for x in (a_ND, b_ND):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a_ND.shape[1] or not np.isfinite(x).all():
            raise ValueError(
                "A Frechet distance needs two sets of at least two finite features of one width; "
                f"{list(a_ND.shape)} and {list(b_ND.shape)} came.\nWhat to do: give more pictures, or features of the same network."
            )
    a, b = _spread(a_ND), _spread(b_ND)
    between_means = np.square(a_ND.mean(axis=0, dtype=np.float64) - b_ND.mean(axis=0, dtype=np.float64)).sum()
    return float(between_means + np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def _spread(x_ND: np.ndarray) -> np.ndarray:
    """The smallest matrix X with X^T X = the covariance."""
    centred = (x_ND - x_ND.mean(axis=0, dtype=np.float64)) / np.sqrt(len(x_ND) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred


def fid(features_ND: np.ndarray, reference_MD: np.ndarray, resamples: int = FID_RESAMPLES, seed: int = 0) -> Fid:
    """The FID of features [N,D] to those of a reference [M,D], with its bootstrap deviation, the same for the same seed."""
    value, random = frechet_distance(features_ND, reference_MD), np.random.default_rng(seed)
    again = [frechet_distance(_resampled(features_ND, random), _resampled(reference_MD, random)) for _ in range(resamples)]
    return Fid(value, len(features_ND), len(reference_MD), float(np.std(again, ddof=1)))


def _resampled(x_ND: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return x_ND[random.integers(len(x_ND), size=len(x_ND))]


class ClipScorer:
    """CLIP from a Hugging Face folder on this machine."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import transformers

        what = "CLIP score"
        self._model = frozen(load_folder(transformers.CLIPModel, folder, what, CLIP_SOURCE), device)
        self._processor = load_processor(transformers.CLIPProcessor, folder, what, CLIP_SOURCE, reads_text=True)
        self._device = device
        self.name = folder.name

    def scores(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """max(0, 100 cos) [N] of each picture, uint8 [H,W,3], with its own prompt (Hessel et al. 2021, without its factor of 2.5).

        Of a long prompt CLIP reads the first 77 tokens.
        """
        if not images or len(images) != len(prompts):
            raise ValueError(
                f"A CLIP score needs a prompt for each picture; {len(images)} pictures and {len(prompts)} prompts came.\n"
                "What to do: give as many of the one as of the other."
            )
        inputs = self._inputs(images, prompts)
        with torch.no_grad():
            found = self._model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100 * cosines.clamp(min=0).double().cpu().numpy()

    def _inputs(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Any]:
        from PIL import Image

        longest = self._model.config.text_config.max_position_embeddings
        text = self._processor.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pictures = [Image.fromarray(checked_images(image[None])[0]) for image in images]
        pixels = self._processor.image_processor(pictures, return_tensors="pt")
        return {name: tensor.to(self._device) for name, tensor in {**text, **pixels}.items()}
