"""The suites `quick` and `paper` as they are shipped, to their end: every judge and the map inside the command, on small random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from distilled_t5.evaluate import compbench, ocr
from distilled_t5.evaluate.compbench_judges import BlipVqa, TransformersDepth, TransformersDetector
from distilled_t5.evaluate.distances import Lpips
from distilled_t5.evaluate.judge_images import read_image
from distilled_t5.evaluate.metrics import METRICS
from distilled_t5.evaluate.pictures import ClipScorer, Inception, fid
from distilled_t5.evaluate.readers import make_reader
from distilled_t5.evaluate.suite import Suite, load_suite
from distilled_t5.prompts.common_text import common_text
from distilled_t5.tests.support.evaluation_world import finish, write_world
from distilled_t5.tests.support.tiny_judges import save_alexnet, save_blip, save_clip, save_depth, save_detector, save_inception
from distilled_t5.tests.support.trainer import PACK
from PIL import Image

PROMPTS = {
    "color": ["a green bench and a red bowl", "a blue car and a green bowl", "a red bench"],
    "shape": ["a green bench and a red bowl", "a round bowl", "a long bench and a round car"],
    "texture": ["a red bench and a green car", "a wooden bench", "a metal car"],
    "spatial": ["a cat next to a traffic light", "a dog on the left of a cat", "a cat near a cat"],
    "3d_spatial": ["a cat in front of a dog", "a dog behind a cat", "a traffic light in front of a cat"],
    "numeracy": ["two cats and a dog", "three dogs", "a cat and two dogs"],
}
CAPTIONS = ["a cat", "a dog on a bench", "a red car"]
ENCODERS = ("teacher", "student")
MAP = "embeddings_teacher_and_student.png"


class Place(NamedTuple):
    """Models, prompts and judges, and the settings that name them."""

    base: Path
    settings: list[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("suites")
    write_world(base)
    prompts, photographs = base / "t2i-compbench", base / "val2014"
    prompts.mkdir()
    photographs.mkdir()
    for category, lines in PROMPTS.items():
        for part in ("train", "val"):
            (prompts / f"{category}_{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    drawn = np.random.default_rng(0)
    images = []
    for number, _ in enumerate(CAPTIONS):
        sides = (40 + 8 * number, 56, 3)  # photographs have sizes of their own
        Image.fromarray(drawn.integers(0, 256, sides, dtype=np.uint8)).save(photographs / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
    annotations = [{"id": number, "image_id": number, "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (base / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    judges = [
        f"compbench.vqa={save_blip(base / 'blip')}",
        f"compbench.detector={save_detector(base / 'tiny-yolos', seed=2)}",
        f"compbench.depth={save_depth(base / 'depth')}",
    ]
    models = ["teacher.t5=teacher.safetensors", "teacher.clip_l=none", 'students=["student.safetensors"]']
    painter = ["diffusion_model.file=flux.safetensors", "diffusion_model.vae=miniature_vae.safetensors", "diffusion_model.dtype=fp32"]
    small = ["sampling.resolution_px=96", "sampling.steps=2", "embedding.prompts=8", "velocity_gap.prompts=4", "latent_distance.prompts=4"]
    return Place(base, [*models, *painter, *small, "cost.repeats=2", "page.prompts=2", "ocr.reader=tesseract", *judges])


def prompts_set(suite: str, base: Path) -> list[str]:
    """Settings that give each task of a suite its prompts, three of them."""
    settings = []
    for number, task in enumerate(load_suite(suite).tasks):
        settings.append(f"task.{number}.prompts.limit=3")
        if task.prompts.kind == "compbench":
            settings.append(f"task.{number}.prompts.path={base / 't2i-compbench'}")
        if task.prompts.kind == "coco":
            settings += [f"task.{number}.prompts.path={base / 'captions.json'}", f"task.{number}.prompts.photographs={base / 'val2014'}"]
    return settings


def evaluated(comfyui: Path, place: Place, name: str, *more: str) -> tuple[Suite, Path]:
    """A shipped suite, run to its end: the suite as it was set, and its folder."""
    settings = [*place.settings, *prompts_set(name, place.base), *more]
    given = [part for setting in settings for part in ("--set", setting)]
    out = place.base / f"out-{name}"
    ours = [str(PACK / "evaluate"), name, "--out", str(out), "--comfyui", str(comfyui), *given]
    finish([*ours, "--", "--base-directory", str(place.base), "--cpu"], place.base)
    return load_suite(name, settings), out


def pictures(out: Path, encoder: str, task: str) -> list[np.ndarray]:
    found = [read_image(path) for path in sorted((out / "images" / encoder / task).glob("*.png"))]
    assert len(found) == 3
    return found


def score(found: dict[str, Any], task: str, number: str, encoder: str) -> float:
    told = found["tasks"][task]["scores"][number][encoder]
    assert told["n"] == 3
    return told["value"]


def compbench_score(suite: Suite, category: str, prompt: str, picture: np.ndarray) -> float:
    """The benchmark's formula on what the suite's network sees in a picture."""
    part = suite.table_of(METRICS["compbench"])
    assert part is not None
    if category in ("color", "shape", "texture"):
        return BlipVqa(Path(part.vqa)).score(picture, compbench.noun_phrases(prompt))
    seen = TransformersDetector(Path(part.detector)).detect(picture)
    if category == "spatial":
        return compbench.spatial_score(prompt, seen, (96, 96))
    if category == "numeracy":
        return compbench.numeracy_score(prompt, seen)
    return compbench.spatial_3d_score(prompt, seen, TransformersDepth(Path(part.depth)).nearness(picture))


def check_text_and_compbench(suite: Suite, out: Path, found: dict[str, Any]) -> None:
    """Compute the scores that both suites have in common again, from the saved images."""
    reader = make_reader("tesseract", None, ("en",))
    targets = [one.target or "" for one in common_text("validation", 3, 0)]
    for encoder in ENCODERS:
        read = [
            ocr.score(target, reader.read(picture)) for target, picture in zip(targets, pictures(out, encoder, "common_text"), strict=True)
        ]
        characters = np.mean([one.character for one in read])
        assert score(found, "common_text", "ocr_character", encoder) == pytest.approx(characters)
        for category, prompts in PROMPTS.items():
            [number] = found["tasks"][category]["scores"]
            painted = pictures(out, encoder, category)
            expected = [compbench_score(suite, category, prompt, picture) for prompt, picture in zip(prompts, painted, strict=True)]
            assert score(found, category, number, encoder) == pytest.approx(np.mean(expected), abs=1e-5)
    for category in ("spatial", "3d_spatial", "numeracy"):
        [by_encoder] = found["tasks"][category]["scores"].values()
        assert max(one["value"] for one in by_encoder.values()) > 0, f"the detector sees cats, and {category} is of cats"
    with Image.open(out / "plots" / MAP) as plot:
        assert len(plot.convert("RGB").getcolors(1 << 24) or []) > 20
    page = (out / "page.html").read_text(encoding="utf-8")
    assert "teacher and student" in page
    assert page.count("data:image/png") >= 1


@pytest.mark.full
def test_the_quick_suite_runs_completely(comfyui_path, place):
    suite, out = evaluated(comfyui_path, place, "quick")
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(found["tasks"]) == ["common_text", *PROMPTS]
    check_text_and_compbench(suite, out, found)


@pytest.mark.full
def test_the_papers_suite_runs_completely(comfyui_path, place):
    weights = [
        f"clip_score.weights={save_clip(place.base / 'clip')}",
        f"fid.weights={save_inception(place.base / 'inception.safetensors')}",
        f"lpips.weights={save_alexnet(place.base / 'alexnet.safetensors')}",
    ]
    suite, out = evaluated(comfyui_path, place, "paper", *weights)
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(found["tasks"]) == ["common_text", *PROMPTS, "coco"]
    check_text_and_compbench(suite, out, found)
    clip, inception, lpips = (
        ClipScorer(place.base / "clip"),
        Inception(place.base / "inception.safetensors"),
        Lpips(place.base / "alexnet.safetensors"),
    )
    photographs = [inception.features(read_image(place.base / "val2014" / f"{number}.png")[None])[0] for number in range(3)]
    for encoder in ENCODERS:
        painted = np.stack(pictures(out, encoder, "coco"))
        assert score(found, "coco", "clip_score", encoder) == pytest.approx(np.mean(clip.scores(list(painted), CAPTIONS)), rel=1e-4)
        distance = fid(inception.features(painted), np.stack(photographs)).value
        assert score(found, "coco", "FID (other Inception)", encoder) == pytest.approx(distance, rel=1e-3)
    apart = lpips.distances(np.stack(pictures(out, "teacher", "coco")), np.stack(pictures(out, "student", "coco")))
    assert score(found, "coco", "lpips", "student") == pytest.approx(apart.mean(), rel=1e-3)
    assert apart.min() > 0
    assert "teacher" not in found["tasks"]["coco"]["scores"]["lpips"]
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "FID (other Inception)" in table
    assert "LPIPS" in table
