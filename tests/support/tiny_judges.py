"""Judges for tests, with random weights: CLIP, BLIP, a detector and depth in small, as transformers writes them; Inception; AlexNet."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import transformers

SIDE_PX = 32
LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES: dict[str, Any] = {"image_size": SIDE_PX, "patch_size": 8}
LABELS = ("cat", "dog", "traffic light")
WORDS = ("yes", "no", "a", "the", "green", "red", "blue", "bench", "bowl", "car", "?")
# channels in and out, kernel, stride, padding of AlexNet's convolutions, and whether its pooling stands before them
CONVOLUTIONS = {
    0: (3, 64, 11, 4, 2, False),
    3: (64, 192, 5, 1, 2, True),
    6: (192, 384, 3, 1, 1, True),
    8: (384, 256, 3, 1, 1, False),
    10: (256, 256, 3, 1, 1, False),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP that reads the letters a to z."""
    signs = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    ids: dict[str, Any] = {
        "vocab_size": len(signs),
        "bos_token_id": len(signs) - 2,
        "eos_token_id": len(signs) - 1,
        "max_position_embeddings": 16,
    }
    config = transformers.CLIPConfig(text_config=LAYERS | ids, vision_config=LAYERS | PICTURES, projection_dim=16)
    tokenizer = transformers.CLIPTokenizer(vocab={sign: number for number, sign in enumerate(signs)}, merges=[])
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    return _save(folder, transformers.CLIPModel(config), seed, transformers.CLIPProcessor(pictures, tokenizer))


def save_blip(folder: Path, seed: int = 0) -> Path:
    """A BLIP for questions that knows WORDS; the sign before an answer follows them, and the one before a question follows that."""
    words = [*SPECIAL, *WORDS]
    ids: dict[str, Any] = {
        "vocab_size": len(words) + 2,
        "bos_token_id": len(words),
        "pad_token_id": 0,
        "sep_token_id": 3,
        "max_position_embeddings": 40,
    }
    text = LAYERS | ids | {"encoder_hidden_size": LAYERS["hidden_size"]}
    config = transformers.BlipConfig(text_config=text, vision_config=LAYERS | PICTURES)
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    pictures = transformers.BlipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX})
    return _save(folder, transformers.BlipForQuestionAnswering(config), seed, transformers.BlipProcessor(pictures, tokenizer))


def save_detector(folder: Path, seed: int = 0) -> Path:
    """A YOLOS that tells LABELS apart."""
    names: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {label: number for number, label in enumerate(LABELS)}}
    config = transformers.YolosConfig(**LAYERS, patch_size=8, image_size=[SIDE_PX, SIDE_PX], num_detection_tokens=5, **names)
    pictures = transformers.YolosImageProcessor(size={"shortest_edge": SIDE_PX, "longest_edge": SIDE_PX})
    return _save(folder, transformers.YolosForObjectDetection(config), seed, pictures)


def save_depth(folder: Path, seed: int = 0) -> Path:
    """A DPT."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    }
    config = transformers.DPTConfig(**LAYERS | PICTURES | sizes)
    pictures = transformers.DPTImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX})
    return _save(folder, transformers.DPTForDepthEstimation(config), seed, pictures)


def save_inception(path: Path) -> Path:
    """torch-fidelity's Inception, whole, its layers filled by chance."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    empty = path.with_suffix(".pth")
    torch.save({}, empty)
    with torch.random.fork_rng(devices=[]), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(empty))
    empty.unlink()
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def save_alexnet(path: Path) -> Path:
    """The convolutions of an AlexNet under torchvision's names."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number, (inputs, outputs, kernel, *_) in CONVOLUTIONS.items():
        shape = (outputs, inputs, kernel, kernel)
        tensors[f"features.{number}.weight"] = torch.randn(shape, generator=generator) / (inputs * kernel**2) ** 0.5
        tensors[f"features.{number}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    if path.suffix == ".pth":  # as torchvision publishes it
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def _save(folder: Path, model: Any, seed: int, processor: Any) -> Path:
    """Weights are drawn wider than networks start with, so that what a picture shows and a text says counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(torch.ones(()) if "norm" in name.lower() and name.endswith("weight") else drawn)
        if isinstance(model, transformers.YolosForObjectDetection):
            # The last class is "nothing": without this it would win always, and every score of a detector be 0.
            model.class_labels_classifier.layers[-1].bias[-1] -= 30
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
