"""The nodes that measure, executed as the graph executes them: CommonText Prompt, OCR Accuracy, Encoder Report, Text Encoder Map."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import numpy as np
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from distilled_t5.evaluate import cost
from distilled_t5.evaluate.annotate import RIGHT, WRONG, boxes, table_image
from distilled_t5.evaluate.cost import Cost, different_names, unload
from distilled_t5.evaluate.embeddings import effective_rank, pooled_distance
from distilled_t5.evaluate.encoder_map import joint_map, pooled_prompts, prompts_of
from distilled_t5.evaluate.readers import Line
from distilled_t5.nodes import EVALUATION_NODES
from distilled_t5.nodes.common_text import DistilledT5CommonTextPrompt
from distilled_t5.nodes.encoder_map import DistilledT5EncoderMap
from distilled_t5.nodes.encoder_report import DistilledT5EncoderReport
from distilled_t5.nodes.ocr_accuracy import DistilledT5OCRAccuracy
from distilled_t5.nodes.show import image_of, pictures_of
from distilled_t5.prompts.common_text import common_text
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import TINY, embedding, serve, student_file
from PIL import Image, ImageDraw, ImageFont

NARROW = StudentLayout(d_model=64, d_ff=128, num_layers=1, num_heads=4, d_kv=16)
PROMPTS = "\n".join(f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fox", "cube", "ship"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return serve(student_file(tmp_path_factory.mktemp("models"), token_length=24)).clip


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cancels at the given check for an interrupt in ComfyUI."""

    def press(at: int) -> None:
        looks = iter(range(at))

        def look() -> None:
            if next(looks, None) is None:
                raise InterruptProcessingException

        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)

    return press


def written(*lines: str) -> torch.Tensor:
    """A picture with lines of text, as an IMAGE."""
    picture = Image.new("RGB", (512, 256), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((30, 30 + 100 * number), line, font=ImageFont.load_default(56), fill=(20, 30, 40))
    return image_of(picture)


@pytest.mark.parametrize("split", ["validation", "unseen_words", "train"])
def test_a_seed_is_a_prompt_of_the_trainers_generator_and_the_text_in_it(split):
    prompt, text = DistilledT5CommonTextPrompt.execute(7, split).args
    [expected] = common_text(split, 1, 7)
    assert (prompt, text) == (expected.text, expected.target)
    assert text in prompt
    assert DistilledT5CommonTextPrompt.execute(8, split).args != (prompt, text)
    with pytest.raises(ValueError, match=r"no split 'test'[\s\S]*What to do: set split to one of train, validation, unseen_words"):
        DistilledT5CommonTextPrompt.execute(7, "test")


@pytest.mark.parametrize("reader", ["easyocr", "tesseract"])
def test_what_stands_in_pictures_is_read_and_scored_and_drawn(reader):
    batch = torch.cat([written("Hello World", "Closed"), written("Hello Word")])
    character, word, sentence, image, report = DistilledT5OCRAccuracy.execute(batch, "hello, world!", reader).args
    # Of "hello world" the second picture has "hello wor" in place: 9 of 11, one word of two, no sentence.
    assert (character, word, sentence) == pytest.approx(((1 + 9 / 11) / 2, 3 / 4, 1 / 2))
    assert image.shape == batch.shape
    green, red = (sum((picture == colour).all(axis=-1).sum() for picture in pictures_of(image)) for colour in (RIGHT, WRONG))
    assert green > 100
    assert red > 100
    lines = report.splitlines()
    assert lines[0] == "expected: hello world"
    assert lines[1] == f"image 1: characters 100.0 %, words 100.0 %, sentence 100.0 % | {reader} read: Hello World / Closed"
    assert lines[2].startswith("image 2: characters 81.8 %, words 50.0 %, sentence 0.0 %")
    assert lines[3] == "mean of 2: characters 90.9 %, words 75.0 %, sentence 50.0 %"


def test_a_picture_without_text_scores_nothing_and_stays_as_it_is():
    blank = torch.full((1, 64, 64, 3), 0.5)
    character, word, sentence, image, report = DistilledT5OCRAccuracy.execute(blank, "x", "tesseract").args
    assert (character, word, sentence) == (0, 0, 0)
    assert pictures_of(image)[0].tobytes() == pictures_of(blank)[0].tobytes()
    assert "tesseract read: no text" in report


def test_a_text_of_signs_alone_is_refused_before_a_reader_is_loaded():
    with pytest.raises(ValueError, match="at least one letter or digit"):
        DistilledT5OCRAccuracy.execute(written("x"), " ?! ", "no such reader")
    with pytest.raises(ValueError, match=r"no reader 'no such reader'[\s\S]*What to do: choose one of them"):
        DistilledT5OCRAccuracy.execute(written("x"), "x", "no such reader")


def test_cancel_ends_reading_between_two_pictures(cancelled, monkeypatch):
    read: list[int] = []
    reader = SimpleNamespace(read=lambda picture: read.append(len(picture)) or [])
    monkeypatch.setattr("distilled_t5.evaluate.ocr_report.make_reader", lambda _name, device: reader)
    cancelled(3)
    with pytest.raises(InterruptProcessingException):
        DistilledT5OCRAccuracy.execute(torch.zeros(5, 8, 8, 3), "x", "easyocr")
    assert read == [8, 8]


def test_alpha_is_left_out_and_colours_survive_an_image_file():
    colours = torch.rand(2, 4, 5, 4)
    there = pictures_of(colours)
    assert [picture.shape for picture in there] == [(4, 5, 3)] * 2
    back = torch.cat([image_of(there[0]), image_of(Image.fromarray(there[1]))])
    torch.testing.assert_close(back, colours[..., :3], atol=0.5 / 255 + 1e-6, rtol=0)


def test_boxes_are_green_and_red_and_their_text_never_leaves_the_picture():
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    lines = [Line("right", (4, 30, 60, 50), 1.0), Line("a long text at the edge", (50, 0, 63, 10), 1.0), Line("low", (1, 60, 9, 63), 1.0)]
    drawn = boxes(picture, lines, [True, False, False])
    assert drawn.shape == picture.shape
    assert tuple(drawn[50, 30]) == RIGHT
    assert tuple(drawn[5, 63]) == WRONG
    assert (picture == 255).all(), "the picture that came in is not drawn on"
    assert boxes(picture, [], []).tobytes() == picture.tobytes()


def test_a_table_is_as_wide_as_its_cells_and_notes_and_has_every_row():
    small, noted = (
        table_image([["a", "b"], ["c", "1"]]),
        table_image([["a", "b"], ["c", "1"]], ["a note that is longer than the table"]),
    )
    assert noted.width > small.width
    assert noted.height > small.height
    more = table_image([["a", "b"], ["c", "1"], ["d", "2"]])
    assert more.height - small.height == 38


def test_the_report_counts_what_the_encoder_holds_and_says_where_it_was_measured(clip):
    image, table = DistilledT5EncoderReport.execute(clip, "a red fox", 2, clip_3=clip).args
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == list(cost.HEADING)
    assert [row[0] for row in rows[2:]] == ["T5 of width 64, 3 layers", "T5 of width 64, 3 layers (2)"]
    held = list(clip.cond_stage_model.parameters())
    assert sum(weight.numel() for weight in held) >= TINY.parameters
    for row in rows[2:]:
        assert row[1] == f"{sum(weight.numel() for weight in held) / 1e6:,.1f} M"
        assert row[2] == f"{sum(weight.numel() * weight.element_size() for weight in held) / 1e6:,.1f} MB"
        assert row[3] == "24"
        assert row[4] == str(clip.patcher.load_device)
    assert f"torch {torch.__version__}" in table
    assert "Medians of 2" in table
    assert image.shape[0] == 1
    assert image.shape[-1] == 3


def test_each_time_is_taken_as_often_as_asked_in_a_state_that_is_known(clip, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(cost, "unload", lambda _clip: events.append("rest"))
    monkeypatch.setattr(cost, "timed", lambda action, _device: ((action(), events.append(action.__name__), float(len(events)))[-1], None))
    told: list[tuple[int, int]] = []
    found = cost.measure(clip, "x", "a red fox", 2, lambda done, total: told.append((done, total)))
    assert events == ["rest", "load_model", "encode", "rest", "encode"] * 2
    assert (found.load_s, found.encode_s, found.prompt_change_s) == ((2, 7), (3, 8), (5, 10))
    assert told == [(done, 6) for done in range(7)]


def test_an_encoder_at_rest_is_loaded_again_and_no_other_model_is_moved(clip, tmp_path):
    other = serve(student_file(tmp_path, NARROW, token_length=8)).clip
    expected = embedding(clip)
    embedding(other)

    def loaded() -> list[Any]:
        return [each.model for each in comfy.model_management.current_loaded_models]

    assert any(model is clip.patcher for model in loaded())
    unload(clip)
    assert not any(model is clip.patcher for model in loaded())
    assert any(model is other.patcher for model in loaded())
    assert torch.equal(embedding(clip), expected)


def test_medians_are_reported_with_their_range_and_encoders_that_stay_on_their_device_are_named():
    one = Cost("A", 1_500_000, 3_000_000, 256, "cuda:0", "cpu", (0.1, 0.3, 0.2), (1.0, 1.0, 4.0), (2.0, 2.0, 2.0))
    two = Cost("B", 1, 1, 256, "cpu", "cpu", (0.0,), (0.0,), (0.0,))
    assert cost.rows([one])[1] == [
        *("A", "1.5 M", "3.0 MB", "256", "cuda:0", "cpu"),
        *("0.200 s (0.100 to 0.300)", "1.000 s (1.000 to 4.000)", "2.000 s (2.000 to 2.000)"),
    ]
    assert cost.notes([two])[-1] == "Kept on the device that runs it, so there is nothing to load: B."
    assert different_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_cancel_ends_the_report_between_two_measurements(clip, cancelled):
    cancelled(2)
    with pytest.raises(InterruptProcessingException):
        DistilledT5EncoderReport.execute(clip, "a red fox", 3)


@pytest.mark.parametrize("node, inputs", [(DistilledT5EncoderReport, ("x", 1)), (DistilledT5EncoderMap, (PROMPTS, 0))])
def test_without_a_clip_with_t5_the_error_says_what_to_connect(node, inputs):
    with pytest.raises(ValueError, match=r"There is no CLIP[\s\S]*What to do: connect a Distilled Text Encoder Loader"):
        node.execute(None, *inputs)
    other = SimpleNamespace(
        cond_stage_model=torch.nn.Linear(1, 1),
        tokenize=lambda _text: {"g": [[(1, 1.0)]]},
        encode_from_tokens_scheduled=lambda _tokens: [],
        load_model=lambda: None,
        patcher=SimpleNamespace(load_device=torch.device("cpu"), offload_device="cpu", model_size=lambda: 0),
    )
    with pytest.raises(ValueError, match=r"This CLIP has no T5 or Qwen3 \(its tokens are for g\)"):
        node.execute(other, *inputs)


def test_a_map_of_two_encoders_shows_the_points_of_both_and_reports_their_spread(clip):
    image, info = DistilledT5EncoderMap.execute(clip, PROMPTS, 0, clip).args
    assert image.shape == (1, 768, 768, 3)
    assert info.splitlines()[0].startswith("T5 of width 64, 3 layers: mean distance ")
    assert [line.rpartition(", of ")[2] for line in info.splitlines()] == ["9 prompts", "9 prompts"]
    again, _ = DistilledT5EncoderMap.execute(clip, PROMPTS, 0, clip).args
    other, _ = DistilledT5EncoderMap.execute(clip, PROMPTS, 2**63, clip).args
    assert torch.equal(image, again)
    assert not torch.equal(image, DistilledT5EncoderMap.execute(clip, PROMPTS, 1, clip).args[0])
    assert other.shape == image.shape


def test_the_map_sees_the_mean_of_the_tokens_without_padding(clip):
    prompts, told = prompts_of(PROMPTS), []
    points = pooled_prompts(clip, prompts, told.append)
    tokens = len(clip.tokenizer.t5xxl.tokenizer("red cube")["input_ids"])
    place = prompts.index("red cube")
    expected = embedding(clip, "red cube")[0, :tokens].mean(dim=0)
    torch.testing.assert_close(torch.from_numpy(points[place]), expected, atol=1e-5, rtol=1e-4)
    assert told == list(range(10))
    picture, info = joint_map({"A": points})
    assert picture.size == (768, 768)
    assert info == f"A: mean distance {pooled_distance(points):.4g}, effective rank {effective_rank(points):.1f}, of 9 prompts"


@pytest.mark.parametrize("text", ["", "a\nb\nc\nd", "a\n" * 50, "a\n b \nb\n\n\nc\nd\n"])
def test_too_few_different_prompts_for_a_map_are_refused(text):
    with pytest.raises(ValueError, match=r"at least 5 different prompts, one on each line: got [014]\.\nWhat to do: write more"):
        prompts_of(text)


def test_encoders_of_two_widths_do_not_share_a_map():
    with pytest.raises(ValueError, match=r"must have the same text width: got A 8, B 4\.\nWhat to do: connect encoders for the same"):
        joint_map({"A": np.random.default_rng(0).normal(size=(6, 8)), "B": np.zeros((6, 4))})


def test_cancel_ends_a_map_between_two_prompts(clip, cancelled):
    cancelled(4)
    with pytest.raises(InterruptProcessingException):
        DistilledT5EncoderMap.execute(clip, PROMPTS, 0)


@pytest.mark.parametrize(
    "package, run, pip",
    [
        ("sklearn", lambda clip: DistilledT5EncoderMap.execute(clip, PROMPTS, 0), "scikit-learn"),
        ("easyocr", lambda _clip: DistilledT5OCRAccuracy.execute(written("x"), "x", "easyocr"), "easyocr"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(clip, monkeypatch, package, run, pip):
    import importlib

    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=rf"needs the package {pip}\.\nWhat to do: .*pip install.*{pip}"):
        run(clip)


def test_ids_and_names_are_those_that_the_issue_gives():
    assert [node.define_schema().node_id for node in EVALUATION_NODES] == [
        "DistilledT5OCRAccuracy",
        "DistilledT5EncoderMap",
        "DistilledT5CrossAttentionMap",
        "DistilledT5AttentionMapImage",
        "DistilledT5EncoderReport",
        "DistilledT5CommonTextPrompt",
    ]
