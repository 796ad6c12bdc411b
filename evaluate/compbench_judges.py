"""Judges of T2I-CompBench from Hugging Face folders: BLIP-VQA, an object detector, a depth estimator."""

# L tokens, D width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .compbench import Detection, attribute_score
from .local_weights import frozen, load_folder, load_processor
from .pictures import checked_images

BLIP_SOURCE = "https://huggingface.co/Salesforce/blip-vqa-base"
DETECTOR_SOURCE = "https://huggingface.co/hustvl/yolos-base, or another detector that transformers' AutoModelForObjectDetection loads"
DEPTH_SOURCE = "https://huggingface.co/Intel/dpt-hybrid-midas, which the benchmark itself uses"
LEAST_CONFIDENCE = 0.5  # the benchmark's
LONGEST_QUESTION = 35


class BlipVqa:
    """BLIP for visual question answering, with the benchmark's questions."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import transformers

        what = "BLIP-VQA"
        self._model = frozen(load_folder(transformers.BlipForQuestionAnswering, folder, what, BLIP_SOURCE), device)
        self._processor = load_processor(transformers.BlipProcessor, folder, what, BLIP_SOURCE, reads_text=True)
        self._device = device
        self._start = self._model.config.text_config.bos_token_id
        self._yes_no = self._processor.tokenizer.convert_tokens_to_ids(["yes", "no"])

    def probabilities_of_yes(self, image: np.ndarray, phrases: Sequence[str]) -> list[float]:
        """The share of "yes" among "yes" and "no" as the answer's first word, to each phrase with a question mark."""
        if not phrases:
            return []
        pixels = self._processor.image_processor(_pil(image), return_tensors="pt").to(self._device)
        with torch.no_grad():
            seen_1LD = self._model.vision_model(pixel_values=pixels["pixel_values"]).last_hidden_state
            # One at a time: transformers' decoder attends to the padding of a shorter question (5.23: shares off by 0.005).
            return [self._yes(seen_1LD, f"{phrase}?") for phrase in phrases]

    def _yes(self, seen_1LD: torch.Tensor, question: str) -> float:
        ids_1L = self._processor.tokenizer(question, truncation=True, max_length=LONGEST_QUESTION, return_tensors="pt").input_ids
        # BLIP was trained with a special token before questions and another before answers; transformers keeps BERT's.
        ids_1L[:, 0] = self._start + 1
        question_1LD = self._model.text_encoder(
            input_ids=ids_1L.to(self._device), encoder_hidden_states=seen_1LD, return_dict=True
        ).last_hidden_state
        start_11 = torch.full((1, 1), self._start, device=self._device)
        answer = self._model.text_decoder(input_ids=start_11, encoder_hidden_states=question_1LD, return_dict=True)
        return float(answer.logits[0, 0, self._yes_no].double().softmax(dim=0)[0])

    def score(self, image: np.ndarray, phrases: Sequence[str]) -> float:
        """The benchmark's score of an image for a prompt of these phrases."""
        return attribute_score(self.probabilities_of_yes(image, phrases))


def _pil(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(checked_images(image[None])[0])


class TransformersDetector:
    """A detector with a list of labels (YOLOS, DETR, RT-DETR)."""

    def __init__(self, folder: Path, device: str = "cpu", least_confidence: float = LEAST_CONFIDENCE) -> None:
        import transformers

        what = "Detecting objects"
        self._model = frozen(load_folder(transformers.AutoModelForObjectDetection, folder, what, DETECTOR_SOURCE), device)
        self._processor = load_processor(transformers.AutoImageProcessor, folder, what, DETECTOR_SOURCE)
        self._device, self._least = device, least_confidence
        self.name = folder.name

    def detect(self, image: np.ndarray) -> list[Detection]:
        """The objects in an RGB image, uint8 [H, W, 3], of which the detector is confident enough."""
        inputs = self._processor(_pil(image), return_tensors="pt").to(self._device)
        with torch.no_grad():
            found = self._model(**inputs)
        [seen] = self._processor.post_process_object_detection(found, threshold=self._least, target_sizes=[image.shape[:2]])
        labels = [self._model.config.id2label[number] for number in seen["labels"].tolist()]
        rows = zip(labels, seen["boxes"].tolist(), seen["scores"].tolist(), strict=True)
        return [Detection(label.lower(), (box[0], box[1], box[2], box[3]), confidence) for label, box, confidence in rows]


class TransformersDepth:
    """A network of relative depth whose numbers are larger where things are nearer (DPT, Depth Anything)."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import transformers

        what = "Estimating depth"
        self._model = frozen(load_folder(transformers.AutoModelForDepthEstimation, folder, what, DEPTH_SOURCE), device)
        self._processor = load_processor(transformers.AutoImageProcessor, folder, what, DEPTH_SOURCE)
        self._device = device
        self.name = folder.name

    def nearness(self, image: np.ndarray) -> np.ndarray:
        """How near each pixel of an RGB image, uint8 [H, W, 3], is: [H,W] float32, larger is nearer."""
        inputs = self._processor(_pil(image), return_tensors="pt").to(self._device)
        with torch.no_grad():
            depth_1HW = self._model(**inputs).predicted_depth
        enlarged = torch.nn.functional.interpolate(depth_1HW[None], size=image.shape[:2], mode="bilinear", align_corners=True)
        return enlarged[0, 0].float().cpu().numpy()
