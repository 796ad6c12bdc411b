"""FID and CLIP score: by hand, against torch-fidelity, against transformers' own forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from distilled_t5.evaluate import pictures
from distilled_t5.evaluate.pictures import ClipScorer, Inception, fid, frechet_distance, metric_name
from distilled_t5.tests.support.tiny_judges import SIDE_PX, save_clip, save_inception
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric


def cross(*lengths: float) -> np.ndarray:
    """Both ends of axes of these lengths: mean 0, covariance diagonal, 2 length^2 / (2 D - 1) on each axis."""
    return np.concatenate([np.diag(lengths), -np.diag(lengths)])


def test_a_shift_alone_counts_by_its_square():
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.array([3, 0, 4, 0])) == pytest.approx(25)


def test_covariances_by_hand():
    """Variances v and 4 v on one axis: v + 4 v - 2 sqrt(v 4 v) = v. Axes of 1 and 4 exchanged: 10 - 2 (2 + 2) = 2, in units of v."""
    unit = 2 / 3
    assert frechet_distance(cross(1, 1), cross(2, 1)) == pytest.approx(unit)
    assert frechet_distance(cross(1, 2), cross(2, 1)) == pytest.approx(2 * unit)
    assert frechet_distance(cross(1, 2), cross(2, 1) + 1) == pytest.approx(2 * unit + 2)


@pytest.mark.parametrize(("n", "m"), [(60, 45), (60, 9), (8, 10)], ids=["more pictures than features", "on one side", "fewer"])
def test_the_distance_is_torch_fidelitys(n, m):
    random = np.random.default_rng(1)
    a, b = random.normal(size=(n, 16)) @ random.normal(size=(16, 16)), random.normal(size=(m, 16)) + 0.5
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


def test_a_fid_comes_with_its_count_and_an_interval_that_shrinks_with_it():
    random = np.random.default_rng(2)
    x, reference = random.normal(size=(400, 3)), random.normal(size=(300, 3)) + 1
    found = fid(x, reference)
    assert found.n == 400
    assert found.value == frechet_distance(x, reference)
    assert found.value == pytest.approx(3, abs=0.6)
    few = fid(x[:25], reference[:25])
    assert found.high is not None and few.high is not None
    assert 0 < found.high - found.value < few.high - few.value
    assert fid(x, reference) == found


@pytest.mark.parametrize("bad", [np.ones((1, 4)), np.ones((9, 3)), np.ones(4), np.full((9, 4), np.nan)])
def test_what_has_no_distance_is_refused(bad):
    with pytest.raises(ValueError, match=r"two sets of at least two finite features(.|\n)*What to do"):
        frechet_distance(np.ones((9, 4)), bad)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("inception") / "weights.safetensors")


def photographs(count: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


def test_features_are_torch_fidelitys_on_the_same_weights(inception_file, tmp_path):
    judge = Inception(inception_file)
    torch.save(load_file(inception_file), tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    [expected] = theirs(torch.from_numpy(photographs(2)).permute(0, 3, 1, 2))
    features = judge.features(photographs(2))
    assert features.shape == (2, 2048)
    assert np.ptp(features) > 0
    assert np.array_equal(features, expected.double().numpy())
    assert judge.metric_name == "FID (other Inception)"


def test_the_published_weights_are_known_by_their_checksum(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"abc")
    assert metric_name(tmp_path / "weights.pth") == "FID (other Inception)"
    monkeypatch.setattr(pictures, "INCEPTION_SHA256", "ba7816bf")  # of "abc", by FIPS 180-2
    assert metric_name(tmp_path / "weights.pth") == "FID"


def test_missing_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"FID needs its weights: there is no file .*none\.pth\.\n.*weights-inception-2015-12-05-6726825d"):
        Inception(tmp_path / "none.pth")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is not torch-fidelity's Inception(.|\n)*What to do"):
        Inception(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("judges") / "tiny-clip")


PROMPTS = ["a green bench", "a bowl of soup on the table", "x", "red", "seven", "a cat", "no", "quiet night"]


def test_clip_scores_are_those_of_the_models_own_forward_pass(clip, tmp_path):
    images = list(photographs(len(PROMPTS), SIDE_PX))
    model, processor = transformers.CLIPModel.from_pretrained(clip), transformers.CLIPProcessor.from_pretrained(clip)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=16)
        expected.append(100 * (model(**inputs).logits_per_image / model.logit_scale.exp()).item())
    assert ClipScorer(clip).scores(images, PROMPTS) == pytest.approx(np.maximum(expected, 0), abs=1e-2)
    turned = Path(shutil.copytree(clip, tmp_path / "turned"))
    tensors = load_file(turned / "model.safetensors")
    save_file(tensors | {"text_projection.weight": -tensors["text_projection.weight"]}, turned / "model.safetensors", {"format": "pt"})
    assert ClipScorer(turned).scores(images, PROMPTS) == pytest.approx(np.maximum(np.negative(expected), 0), abs=1e-2)
    assert np.ptp(expected) > 5, "pictures and prompts count"


def test_clip_scores_need_as_many_prompts_as_pictures(clip):
    scorer = ClipScorer(clip)
    for images, prompts in (([], []), (list(photographs(2)), ["one"])):
        with pytest.raises(ValueError, match=r"a prompt for each image: got \d images and \d prompts"):
            scorer.scores(images, prompts)
    with pytest.raises(ValueError, match="uint8"):
        scorer.scores([np.zeros((8, 8, 4), np.uint8)], ["one"])


def test_an_incomplete_folder_is_refused_with_what_it_lacks(clip, tmp_path):
    with pytest.raises(ValueError, match=r"there is no such folder\.\nWhat to do: download all of it.*clip-vit-base-patch32"):
        ClipScorer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        ClipScorer(tmp_path)
    folder = Path(shutil.copytree(clip, tmp_path / "half"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a complete CLIPModel: 1 tensors differ\.\n.*visual_projection\.weight: missing"):
        ClipScorer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded for CLIP score: files are missing(.|\n)*Found: (.|\n)*What to do"):
        ClipScorer(folder)


def test_a_missing_tokenizer_or_preprocessor_is_reported(clip, tmp_path):
    for lost, said in (
        ("tokenizer*", "lacks its tokenizer: expected tokenizer.json or"),
        ("*processor_config.json", "could not be loaded for CLIP"),
    ):
        folder = Path(shutil.copytree(clip, tmp_path / lost.strip("*")))
        for path in folder.glob(lost):
            path.unlink()
        with pytest.raises(ValueError, match=rf"{said}(.|\n)*What to do"):
            ClipScorer(folder)
