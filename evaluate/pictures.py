"""FID of images against a reference set, and CLIP score of images against their prompts."""

# N images, H W pixels, D features

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.failure import is_out_of_memory
from ..runtime.optional import needed
from .local_weights import frozen, load_file, load_folder, load_processor
from .measured import Measured

INCEPTION_FEATURES = "2048"
# The Inception of the FID's authors as torch-fidelity, pytorch-fid and torchmetrics read it; its SHA-256 begins as its name ends.
INCEPTION_SHA256 = "6726825d"
INCEPTION_SOURCE = (
    f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth, https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
)
CLIP_SOURCE = "https://huggingface.co/openai/clip-vit-base-patch32 (config, tokenizer and preprocessor files, and model.safetensors)"
FID_RESAMPLES = 20


class Inception:
    """The network whose features the FID compares, by torch-fidelity, with weights from a file."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        extractors = needed("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "FID")
        tensors = load_file(weights, "FID", INCEPTION_SOURCE)
        self.metric_name = metric_name(weights)
        # torch-fidelity would run code in the file, so it gets a copy of the tensors alone.
        plain = io.BytesIO()
        torch.save(tensors, plain)
        plain.seek(0)
        try:
            network = extractors.FeatureExtractorInceptionV3("inception", [INCEPTION_FEATURES], feature_extractor_weights_path=plain)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            found = str(error).partition("\n")[0]
            raise ValueError(f"{weights} is not torch-fidelity's Inception: {found}\nWhat to do: use {INCEPTION_SOURCE}") from error
        self._network, self._device = frozen(network, device), device

    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, 2048], float64, of RGB images of one size, uint8 [N, H, W, 3]."""
        images = torch.from_numpy(checked_images(images_NHWC)).permute(0, 3, 1, 2).to(self._device)
        with torch.no_grad():
            [features_ND] = self._network(images)
        return features_ND.double().cpu().numpy()


def metric_name(inception: Path) -> str:
    """FID, or a name that says that the weights are not the published ones, which give other numbers."""
    with inception.open("rb") as file:
        published = hashlib.sha256(file.read()).hexdigest().startswith(INCEPTION_SHA256)
    return "FID" if published else "FID (other Inception)"


def checked_images(images_NHWC: np.ndarray) -> np.ndarray:
    """The images, contiguous in memory. Raises ValueError if they are not uint8 [N, H, W, 3]."""
    if images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3 or images_NHWC.dtype != np.uint8 or not images_NHWC.size:
        raise ValueError(
            f"Expected RGB images of one size, uint8 [N, height, width, 3]: got {images_NHWC.dtype} {list(images_NHWC.shape)}.\n"
            "What to do: stack images of one size, without alpha channels, and scale their values to 0..255."
        )
    return np.ascontiguousarray(images_NHWC)


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """The Frechet distance of the normal distributions with the means and covariances of two sets of features (Heusel et al. 2017).

    The trace of the root of the covariances' product is the sum of the singular values of the product of the centred sets: that is exact
    where there are fewer images than features, and a root of the matrix is not. Raises ValueError for fewer than two features a set.
    """
    for x in (a_ND, b_ND):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a_ND.shape[1] or not np.isfinite(x).all():
            raise ValueError(
                "A Frechet distance needs two sets of at least two finite features of one width: "
                f"got {list(a_ND.shape)} and {list(b_ND.shape)}.\nWhat to do: give more images, or features of the same network."
            )
    a, b = _spread(a_ND), _spread(b_ND)
    between_means = np.square(a_ND.mean(axis=0, dtype=np.float64) - b_ND.mean(axis=0, dtype=np.float64)).sum()
    return float(between_means + np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def _spread(x_ND: np.ndarray) -> np.ndarray:
    """The smallest matrix X with X^T X = the covariance."""
    centred = (x_ND - x_ND.mean(axis=0, dtype=np.float64)) / np.sqrt(len(x_ND) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred


def fid(features_ND: np.ndarray, reference_MD: np.ndarray, resamples: int = FID_RESAMPLES) -> Measured:
    """The FID of features [N, D] to those of a reference [M, D], with the interval of its bootstrap deviation.

    The FID of few images is too high, so compare only distances over the same n.
    """
    value, random = frechet_distance(features_ND, reference_MD), np.random.default_rng(0)
    again = [frechet_distance(_resampled(features_ND, random), _resampled(reference_MD, random)) for _ in range(resamples)]
    return Measured.with_deviation(value, len(features_ND), float(np.std(again, ddof=1)))


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
        """max(0, 100 cos) [N] of each image, uint8 [H, W, 3], with its own prompt (Hessel et al. 2021, without its factor of 2.5).

        CLIP reads only the first 77 tokens of a prompt.
        """
        if not images or len(images) != len(prompts):
            raise ValueError(
                f"A CLIP score needs a prompt for each image: got {len(images)} images and {len(prompts)} prompts.\n"
                "What to do: give as many prompts as images."
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
        pixels = self._processor.image_processor([Image.fromarray(checked_images(image[None])[0]) for image in images], return_tensors="pt")
        return {name: tensor.to(self._device) for name, tensor in {**text, **pixels}.items()}
