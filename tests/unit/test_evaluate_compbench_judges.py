"""CompBench's judges from folders: small random networks of transformers' own kinds, held against transformers' other paths."""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from distilled_t5.evaluate.compbench_judges import BlipVqa, TransformersDepth, TransformersDetector
from distilled_t5.tests.support.tiny_judges import LABELS, SIDE_PX, save_blip, save_depth, save_detector

PHRASES = ["a green bench", "the red", "a blue bowl the red car"]


def photograph(height: int = SIDE_PX, width: int = SIDE_PX, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("judges") / "tiny-blip")


def yes_by_generation(folder, image: np.ndarray, phrase: str) -> float:
    """P(yes) / (P(yes) + P(no)) of the first word that transformers' own generation would draw from."""
    model: Any = transformers.BlipForQuestionAnswering.from_pretrained(folder)
    processor: Any = transformers.BlipProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=f"{phrase}?", return_tensors="pt")
    start = model.config.text_config.bos_token_id
    inputs["input_ids"][:, 0] = start + 1
    drawn = model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True, output_logits=True)
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    shares = drawn.logits[0][0].softmax(dim=0)
    return float(shares[yes] / (shares[yes] + shares[no]))


def test_blip_answers_as_transformers_own_generation_does(blip):
    judge, image = BlipVqa(blip), photograph(40, 60)
    found = judge.probabilities_of_yes(image, PHRASES)
    assert found == pytest.approx([yes_by_generation(blip, image, phrase) for phrase in PHRASES], abs=1e-5)
    assert len({round(share, 2) for share in found}) == 3, "the question counts, by much more than rounding does"
    assert judge.score(image, PHRASES) == pytest.approx(np.prod(found))
    assert judge.probabilities_of_yes(photograph(40, 60, seed=1), PHRASES) != pytest.approx(found, abs=1e-3), "the picture counts"


def test_without_phrases_nothing_is_asked(blip):
    judge = BlipVqa(blip)
    assert judge.probabilities_of_yes(photograph(), []) == []
    assert judge.score(photograph(), []) == 1


def test_a_detector_tells_labels_and_boxes_in_pixels(tmp_path):
    folder, image = save_detector(tmp_path / "tiny-yolos"), photograph(40, 60)
    every = TransformersDetector(folder, least_confidence=0.0)
    found = every.detect(image)
    model, processor = (
        transformers.YolosForObjectDetection.from_pretrained(folder),
        transformers.YolosImageProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        seen = model(**processor(image, return_tensors="pt"))
    shares = seen.logits[0].softmax(dim=-1)[:, :-1]
    assert every.name == "tiny-yolos"
    assert len(found) == len(shares) == 5
    for detection, share, (middle_x, middle_y, width, height) in zip(found, shares, seen.pred_boxes[0].tolist(), strict=True):
        box = (60 * (middle_x - width / 2), 40 * (middle_y - height / 2), 60 * (middle_x + width / 2), 40 * (middle_y + height / 2))
        assert detection.label == LABELS[int(share.argmax())]
        assert detection.box == pytest.approx(box, abs=1e-3)
        assert detection.confidence == pytest.approx(float(share.max()), abs=1e-5)
    sure = sorted(detection.confidence for detection in found)[2]
    assert TransformersDetector(folder, least_confidence=sure).detect(image) == [one for one in found if one.confidence > sure]


def test_depth_has_the_pictures_size(tmp_path):
    folder, image = save_depth(tmp_path / "tiny-dpt"), photograph(40, 60)
    judge = TransformersDepth(folder)
    model, processor = transformers.DPTForDepthEstimation.from_pretrained(folder), transformers.DPTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        seen = model(**processor(image, return_tensors="pt")).predicted_depth[0].numpy()
    found = judge.nearness(image)
    assert found.shape == (40, 60)
    assert np.ptp(found) > 0
    corners = np.ix_([0, -1], [0, -1])
    assert found[corners] == pytest.approx(seen[corners], abs=1e-5)


@pytest.mark.parametrize(
    ("judge", "source"), [(BlipVqa, "blip-vqa-base"), (TransformersDetector, "hustvl/yolos-base"), (TransformersDepth, "dpt-hybrid-midas")]
)
def test_a_missing_folder_is_reported_with_its_download(tmp_path, judge, source):
    with pytest.raises(ValueError, match=rf"there is no such folder\.\nWhat to do: download all of it.*{source}"):
        judge(tmp_path / "none")


def test_code_in_a_folder_is_never_run(tmp_path):
    (tmp_path / "judge.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    )
    names = {"AutoConfig": "judge.Config", "AutoModelForObjectDetection": "judge.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": names}))
    with pytest.raises(ValueError, match=r"needs code of its own to be run, which is never done here\.?(.|\n)*What to do") as caught:
        TransformersDetector(tmp_path)
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_pickled_code_are_never_run(tmp_path):
    folder = save_detector(tmp_path / "yolos")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": re.compile("code")}))
    with pytest.raises(ValueError, match=r"could not be loaded for Detecting objects(.|\n)*What to do") as caught:
        TransformersDetector(folder)
    assert "weights_only" not in str(caught.value)
