"""EasyOCR's number in an evaluation of the miniature, beside the exact reader's: they agree as far as EasyOCR can read the font."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilled_t5.devtools.miniature import untrained_file
from distilled_t5.devtools.miniature_results import UNTRAINED
from distilled_t5.evaluate import ocr
from distilled_t5.evaluate.metrics import OcrPart
from distilled_t5.evaluate.readers import make_reader
from distilled_t5.evaluate.suite import Suite, load_suite
from distilled_t5.tests.support.evaluation_world import finish
from distilled_t5.tests.support.trainer import PACK
from distilled_t5.world.pictures import render
from distilled_t5.world.questions import questions

WORDS = 60
CELL_PX = 8


def suite_of_words() -> Suite:
    """The miniature's suite with one task, signs of a word, before both readers."""
    suite = load_suite("miniature")
    [task] = [one for one in suite.tasks if one.name == "word"]
    prompts = task.prompts.model_copy(update={"limit": WORDS})
    asked = {"tasks": (task.model_copy(update={"prompts": prompts, "metrics": ("readback", "ocr")}),)}
    no_probes = dict.fromkeys(("embedding", "velocity_gap", "latent_distance", "cost"))
    return suite.model_copy(update={**asked, **no_probes, "ocr": OcrPart(reader="easyocr", languages=("en",))})


@pytest.fixture(scope="module")
def numbers(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the command says, by number and encoder."""
    folder = tmp_path_factory.mktemp("ocr")
    suite = folder / "words.toml"
    suite.write_text(suite_of_words().to_toml(), encoding="utf-8")
    ours = [str(PACK / "evaluate"), str(suite), "--student", str(untrained_file(folder)), "--out", str(folder / "out")]
    finish([*ours, "--comfyui", str(comfyui_path), "--", "--cpu"], folder)
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["tasks"]["word"]["scores"]


@pytest.mark.full
def test_easyocr_reads_on_generated_signs_what_it_reads_on_perfect_ones(numbers):
    reader = make_reader("easyocr")
    perfect = [
        ocr.score(" ".join(scene.words), reader.read((render(scene, CELL_PX) * 255).astype(np.uint8))).word
        for scene, _ in questions("word", WORDS)
    ]
    legible, right = float(np.mean(perfect)), numbers["readback"]["miniature_teacher"]["value"]
    assert legible > 0.5, "a font of 3 x 5 cells, and it reads about two words of three"
    assert right >= 0.9
    # A right picture is the perfect one but for two cells; a wrong one may be read right or wrong.
    found = numbers["ocr_word"]["miniature_teacher"]["value"]
    assert legible - (1 - right) - 0.1 <= found <= legible + (1 - right) + 0.1


@pytest.mark.full
def test_where_the_exact_reader_finds_nothing_easyocr_finds_nothing(numbers):
    assert numbers["readback"][UNTRAINED]["value"] == 0
    assert numbers["ocr_word"][UNTRAINED]["value"] <= 0.05
    assert numbers["ocr_character"][UNTRAINED]["value"] < numbers["ocr_character"]["miniature_teacher"]["value"] / 2
