"""Encoder files: opened and checked before a tensor is loaded, written aside and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..runtime.disk import UNFINISHED, sync_folder
from ..runtime.errors import StudentFileError, listed, printable
from ..students.t5.layout import SHARED, Shape, StudentLayout, read_layout
from .dialects import published_names, split_twin
from .foreign import refuse_foreign, refuse_unprojected
from .metadata import HASH_KEY, HEADER_HASH_KEY, KEY, NO_HASH, StudentMetadata, check_against_layout, described, read_metadata
from .stream import SAFETENSORS_NAMES, write_stream
from .torch_zip import check_torch_zip, load_torch_zip

SAFETENSORS = (".safetensors", ".sft")
TORCH_ZIPS = (".pth", ".pt", ".bin", ".ckpt")
FLOATS = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
FLOAT_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}
# What a person may choose for weights.
CHOICES = {name: dtype for dtype, name in FLOAT_NAMES.items() if dtype != torch.float8_e5m2}
GGUF = b"GGUF"
# The ending of a file that is being written; one that has not changed for an hour belongs to a process that was killed.
ABANDONED_S = 3600.0
ANOTHER_FILE = "download the file again, or use an earlier checkpoint: such weights give black or broken pictures."
OTHER_WEIGHTS = (
    "take away the LoRA or merge that broke them, or lower its strength; or load the encoder as bf16 or fp32. "
    "In training, go back to an earlier checkpoint."
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudentFile:
    """A checked encoder file: every tensor is known by name and shape, none is loaded yet.

    names: published name -> name in the file. twin: the name of a duplicate of the token table, if the file has one.
    """

    path: Path
    layout: StudentLayout
    metadata: StudentMetadata
    dtype: torch.dtype
    names: Mapping[str, str]
    twin: str | None = None

    def load(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """All tensors on the CPU by published name. Raises StudentFileError for a wrong hash, a false twin, numbers not finite."""
        return self.checked(load_tensors(self.path, self.between(progress)), progress)

    def between(self, progress: Progress | None) -> Callable[[], None]:
        """Calls `progress`, which may raise to cancel, with nothing done yet: for what is done before the tensors are looked at."""
        return lambda: None if progress is None else progress(0, len(self.names))

    def checked(self, loaded: Mapping[str, Tensor], progress: Progress | None = None) -> dict[str, Tensor]:
        """The loaded tensors of the file by published name, after the checks that need their numbers."""
        check_hash(self, self.between(progress))
        shapes = self.layout.tensors()
        if any(source not in loaded or tuple(loaded[source].shape) != shapes[name] for name, source in self.names.items()):
            raise StudentFileError(f"{self.path.name} was changed while it was being read.", "wait until it is written, then run again.")
        tensors = {name: loaded[source] for name, source in self.names.items()}
        if self.twin is not None and not _same(tensors[SHARED], loaded.get(self.twin)):
            raise StudentFileError(
                f"{self.path.name} holds two token tables that differ ({self.names[SHARED]} and {self.twin}).", "export the file again."
            )
        check_finite(tensors, self.path.name, progress)
        return tensors


def open_student(path: str | os.PathLike[str]) -> StudentFile:
    """Check everything about a file that can be checked without loading its tensors.

    Raises StudentFileError: not a file, not readable, of another kind, tensors missing or too many or of a wrong shape, metadata that lies.
    """
    path = Path(path)
    shapes, dtypes, header = read_header(path)
    names, twin = split_twin(published_names(shapes))
    by_name: dict[str, Shape] = {name: shapes[source] for name, source in names.items()}
    where = path.name
    refuse_foreign(by_name, where)
    metadata = read_metadata(header, where)
    if not metadata.described:
        refuse_unprojected(by_name, where)
    layout = read_layout(by_name, where)
    check_against_layout(metadata, layout, where)
    if twin is not None and (shapes[twin], dtypes[twin]) != (by_name[SHARED], dtypes[names[SHARED]]):
        raise StudentFileError(f"{where} holds two token tables of different shapes or number formats.", "export the file again.")
    dtype = _float_type(dtypes, where)
    _refuse_endless(path, {name: math.prod(shape) * FLOATS[dtypes[names[name]]].itemsize for name, shape in by_name.items()})
    return StudentFile(path, layout, metadata, dtype, names, twin)


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.dtype == tensor.dtype and torch.equal(tensor, other)


def _refuse_endless(path: Path, sizes: Mapping[str, int]) -> None:
    """A .pth can say that one number stands for a million million equal ones."""
    with _reading(path):
        held = path.stat().st_size
    if sum(sizes.values()) > held:
        largest = max(sizes, key=lambda name: sizes[name])
        raise StudentFileError(
            f"{path.name} names tensors of {sum(sizes.values()):,} bytes, more than the file's {held:,}.",
            "export the file again, with tensors that are not views of each other.",
            f"The largest is {largest} ({sizes[largest]:,} bytes).",
        )


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str], dict[str, str] | None]:
    """Shapes and dtype names of the tensors, and the metadata of a safetensors file (None for a torch zip)."""
    check_readable(path)
    if path.suffix.lower() in SAFETENSORS:
        with _safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {name: part.get_dtype() for name, part in slices.items()}, file.metadata()
    with _reading(path):
        tensors = load_torch_zip(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, {name: _dtype_name(tensor) for name, tensor in tensors.items()}, None


def check_readable(path: Path) -> None:
    """Raise StudentFileError if there is no such file, or it is empty or of an ending that cannot hold an encoder."""
    with _reading(path):
        if path.is_dir():
            raise StudentFileError(f"{path.name} is a folder; expected a .safetensors file.", "pick a file, such as one inside the folder.")
        if not path.is_file():
            raise StudentFileError(f"{path.name} is not there any more.", "refresh the file list (key R) and pick a file that is listed.")
        with path.open("rb") as file:
            start = file.read(len(GGUF))
    if not start:
        raise StudentFileError(f"{path.name} is empty (0 bytes).", "download the file again.")
    ending = path.suffix.lower()
    if ending == ".gguf" or start == GGUF:
        raise StudentFileError(
            f"{path.name} is a GGUF file; an encoder is read from .safetensors here.",
            "use the .safetensors file (it is small already), or load a GGUF T5-XXL with the nodes of ComfyUI-GGUF.",
        )
    if ending not in SAFETENSORS + TORCH_ZIPS:
        raise StudentFileError(
            f"{path.name} has the ending {ending!r}; expected .safetensors (or the authors' .pth).", "pick another file."
        )


def load_tensors(path: Path, between_chunks: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Every tensor of a file on the CPU, by its name in the file. Nothing in the file is ever executed.

    `between_chunks` may raise to cancel while the checksums of a torch zip are computed.
    """
    check_readable(path)
    if path.suffix.lower() in SAFETENSORS:
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    with _reading(path):
        tensors = load_torch_zip(path)
        check_torch_zip(path, between_chunks)
    return tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever the system says about a file that cannot be read becomes a StudentFileError."""
    try:
        yield
    except OSError as error:
        raise StudentFileError(
            f"{printable(path.name)} could not be read: {error.strerror or error}.",
            "see that the file and its folder are there and may be read by ComfyUI.",
        ) from error


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[safetensors.safe_open]:
    try:
        with _reading(path), safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, RuntimeError) as error:
        # RuntimeError: torch could not map the file, or has no tensors of a kind of number that the file names.
        size = path.stat().st_size if path.is_file() else 0
        raise StudentFileError(
            f"{path.name} is no whole safetensors file ({size:,} bytes).",
            "download it again; it may have been cut off or renamed.",
            f"Found: {printable(str(error))}",
        ) from error


def _float_type(dtypes: Mapping[str, str], where: str) -> torch.dtype:
    """The dtype that most tensors have. All must be floating point."""
    odd = [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    if odd:
        raise StudentFileError(
            f"{where}: {len(odd)} tensors are no floating point numbers that can be served ({', '.join(FLOATS)}).",
            "export the file again in bf16 (a file quantised for another program cannot be read here).",
            listed(odd),
        )
    found = list(dtypes.values())
    return FLOATS[max(set(found), key=found.count)]


def check_finite(tensors: Mapping[str, Tensor], where: str, progress: Progress | None = None, remedy: str = ANOTHER_FILE) -> None:
    """Raise StudentFileError that lists every tensor with a NaN or an infinity."""
    broken = not_finite(tensors, progress)
    if broken:
        raise StudentFileError(
            f"{where}: {len(broken)} tensors hold numbers that are not finite (NaN or infinity).",
            remedy,
            listed(broken),
        )


def not_finite(tensors: Mapping[str, Tensor], progress: Progress | None = None) -> list[str]:
    """Names of the tensors with a NaN or an infinity."""
    broken = []
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        # torch has no isfinite for 8-bit floats; as 16-bit floats their NaN and infinity stay what they are.
        numbers = tensor.to(torch.float16) if tensor.element_size() == 1 else tensor
        # aminmax passes NaN on, and needs no copy of the tensor.
        if not torch.isfinite(torch.stack(torch.aminmax(numbers))).all():
            broken.append(name)
        if progress is not None:
            progress(done, len(tensors))
    return broken


def check_hash(file: StudentFile, between_chunks: Callable[[], None]) -> None:
    """Raise StudentFileError if the file names the SHA-256 of its data or of its header, and it has another one."""
    told = {
        "data": (file.metadata.sha256, lambda path: data_sha256(path, between_chunks)),
        "header": (file.metadata.header_sha256, header_sha256),
    }
    for part, (expected, sha256) in told.items():
        if expected is None:
            continue
        with _reading(file.path):
            found = sha256(file.path)
        if found != expected:
            raise StudentFileError(
                f"{file.path.name} was changed or damaged: its {part} does not have the SHA-256 that its metadata names.",
                "download or export the file again.",
                f"Expected {expected}\nFound    {found}",
            )


def data_sha256(path: Path, between_chunks: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of what follows the header of a safetensors file, in hexadecimal digits (ModelSpec's hash_sha256)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            between_chunks()
    return digest.hexdigest()


def header_sha256(path: Path) -> str:
    """SHA-256 of what the header of a safetensors file says about the tensors, and of our own strings in it, in hexadecimal digits.

    Titles, authors and the like are not part of it: they may be changed by other tools.
    """
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    # Pairs keep a name that stands there twice; numbers stay text, because Python reads no number of 5,000 digits.
    said: list[str] = []
    for name, fields in json.loads(header, object_pairs_hook=list, parse_int=str):
        ours = [field for field in fields if name != "__metadata__" or (field[0].startswith(KEY) and field[0] != HEADER_HASH_KEY)]
        said.append(json.dumps([name, sorted(ours, key=lambda field: field[0])]))
    return hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()


def write_student(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: StudentMetadata | None = None,
    progress: Progress = lambda _done, _total: None,
    overwrite: bool = True,
) -> Path:
    """Write an encoder file in the published dialect, with metadata, whole or not at all; returns its path.

    With `overwrite` off, a file that has come to stand there meanwhile stays, and the new one gets a number.

    The tensors (published names) are checked as on loading. `progress(bytes written, bytes in all)` may raise to cancel. Raises
    StudentFileError for tensors that are no distilled T5, OSError when the disk does not take the file; whatever is raised, nothing is
    left behind and an existing file stays as it was.
    """
    path = Path(path)
    metadata = metadata or StudentMetadata()
    layout = read_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path.name)
    dtype = _float_type({name: _dtype_name(tensor) for name, tensor in tensors.items()}, path.name)
    check_finite(tensors, path.name, lambda _done, total: progress(0, total), OTHER_WEIGHTS)
    header = described(metadata, layout, FLOAT_NAMES[dtype])
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        sha256 = write_stream(aside, sizes, tensors.__getitem__, header, progress)
        _fill_in_hashes(aside, sha256)
        path = _publish(aside, path, overwrite)
        sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        _remove_abandoned(path.parent)
    return path


def not_written(path: Path, error: OSError) -> OSError:
    """What is said when the system does not take a file."""
    return OSError(
        f"{path.name} could not be written to {path.parent}: {error}.\n"
        "What to do: see that the folder is there and may be written to, and that the disk has room."
    )


def _publish(aside: Path, path: Path, overwrite: bool) -> Path:
    """Give the finished file its name; returns it."""
    while not overwrite:
        try:
            os.link(aside, path)
        except FileExistsError:  # noqa: PERF203 (it waits for a name that is free)
            path = unused_path(path)
        except OSError:  # no hard links here (exFAT, some network shares): a look before the rename has to do
            path, overwrite = unused_path(path), True
        else:
            return path
    os.replace(aside, path)
    return path


def _dtype_name(tensor: Tensor) -> str:
    return SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype))


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left behind."""
    for left in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if re.search(rf"\.[0-9]+{re.escape(UNFINISHED)}$", left.name) and time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink()


def _fill_in_hashes(path: Path, data_sha256: str) -> None:
    """Put the hashes into the header, in the places of the same length that were left for them, and the file onto the disk."""
    digests = {HASH_KEY: data_sha256, HEADER_HASH_KEY: header_sha256(path)}
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        for key, digest in digests.items():
            place = f'"{key}":"{NO_HASH}"'.encode()
            file.seek(8 + header.index(place) + len(place) - len(digest) - 1)
            file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def unused_path(path: Path) -> Path:
    """The path itself, or `name_00002.safetensors` and so on if there is a file of that name: nothing is ever written over."""
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.stem}_{number:05}{path.suffix}"), number + 1
    return free
