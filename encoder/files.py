"""Encoder files: opened and checked before a tensor is loaded, written aside and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .dialects import published_names, split_twin
from .errors import StudentFileError, listed
from .foreign import refuse_foreign, refuse_unprojected
from .layout import SHARED, Shape, StudentLayout, read_layout
from .metadata import HASH_KEY, NO_HASH, StudentMetadata, check_against_layout, described, read_metadata

SAFETENSORS = (".safetensors", ".sft")
TORCH_ZIPS = (".pth", ".pt", ".bin", ".ckpt")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FLOAT_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}
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
        return self.checked(load_tensors(self.path), progress)

    def checked(self, loaded: Mapping[str, Tensor], progress: Progress | None = None) -> dict[str, Tensor]:
        """The loaded tensors of the file by published name, after the checks that need their numbers."""
        check_hash(self)
        tensors = {name: loaded[source] for name, source in self.names.items()}
        if self.twin is not None and not torch.equal(tensors[SHARED], loaded[self.twin]):
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
    layout = read_layout(by_name, where)
    if not layout.has_projection and not metadata.described:
        refuse_unprojected(by_name, layout.d_model, where)
    check_against_layout(metadata, layout, where)
    if twin is not None and shapes[twin] != by_name[SHARED]:
        raise StudentFileError(f"{where} holds two token tables of different shapes.", "export the file again.")
    return StudentFile(path, layout, metadata, _float_type({source: dtypes[source] for source in names.values()}, where), names, twin)


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str], dict[str, str] | None]:
    """Shapes and dtype names of the tensors, and the metadata of a safetensors file (None for a torch zip)."""
    check_readable(path)
    if path.suffix.lower() in SAFETENSORS:
        with _safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {name: part.get_dtype() for name, part in slices.items()}, file.metadata()
    tensors = _load_torch_zip(path)
    names = {dtype: name for name, dtype in FLOATS.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, {name: names.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}, None


def check_readable(path: Path) -> None:
    """Raise StudentFileError if there is no such file, or it is empty or of an ending that cannot hold an encoder."""
    if not path.is_file():
        raise StudentFileError(f"{path.name} is not there any more.", "refresh the file list (key R) and pick a file that is listed.")
    if path.stat().st_size == 0:
        raise StudentFileError(f"{path.name} is empty (0 bytes).", "download the file again.")
    ending = path.suffix.lower()
    if ending == ".gguf":
        raise StudentFileError(
            f"{path.name} is a GGUF file; a distilled T5 is read from .safetensors.",
            "use the .safetensors file (it is small already), or load a GGUF T5-XXL with the nodes of ComfyUI-GGUF.",
        )
    if ending not in SAFETENSORS + TORCH_ZIPS:
        raise StudentFileError(
            f"{path.name} has the ending {ending!r}; expected .safetensors (or the authors' .pth).", "pick another file."
        )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file on the CPU, by its name in the file. Nothing in the file is ever executed."""
    if path.suffix.lower() in SAFETENSORS:
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return _load_torch_zip(path)


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[safetensors.safe_open]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        size = path.stat().st_size if path.is_file() else 0
        raise StudentFileError(
            f"{path.name} is no whole safetensors file ({size:,} bytes).",
            "download it again; it may have been cut off or renamed.",
            f"Found: {error}",
        ) from error


def _load_torch_zip(path: Path) -> dict[str, Tensor]:
    """A state dict saved by torch.save, weights only: a file that carries code is refused, not run."""
    where = path.name
    if not zipfile.is_zipfile(path):
        raise StudentFileError(f"{where} is no file that torch.save wrote (since torch 1.6).", "use the .safetensors file.")
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise StudentFileError(f"{where} unpacks to more than its own size, which torch.save never writes.", "do not use this file.")
    try:
        content = torch.serialization.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the file makes it raise
        raise StudentFileError(
            f"{where} could not be read as plain weights: it is damaged, or it carries code, which is never run.",
            "use the .safetensors file, or a .pth that holds a state dict of tensors only.",
            f"Found: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise StudentFileError(f"{where} holds no table of named tensors.", "save model.state_dict(), or use the .safetensors file.")
    return dict(content)


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


def check_finite(tensors: Mapping[str, Tensor], where: str, progress: Progress | None = None) -> None:
    """Raise StudentFileError that lists every tensor with a NaN or an infinity."""
    broken = []
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        # torch has no isfinite for 8-bit floats; as 16-bit floats their NaN and infinity stay what they are.
        numbers = tensor.to(torch.float16) if tensor.element_size() == 1 else tensor
        # One NaN or infinity makes the sum of all magnitudes' maximum not finite; amax needs no copy of the tensor.
        if not torch.isfinite(torch.stack(torch.aminmax(numbers))).all():
            broken.append(name)
        if progress is not None:
            progress(done, len(tensors))
    if broken:
        raise StudentFileError(
            f"{where}: {len(broken)} tensors hold numbers that are not finite (NaN or infinity).",
            "download the file again, or use an earlier checkpoint: such weights give black or broken pictures.",
            listed(broken),
        )


def check_hash(file: StudentFile) -> None:
    """Raise StudentFileError if the file names the SHA-256 of its data and the data has another one."""
    if file.metadata.sha256 is None:
        return
    found = data_sha256(file.path)
    if found != file.metadata.sha256:
        raise StudentFileError(
            f"{file.path.name} was changed or damaged: its data does not have the SHA-256 that its metadata names.",
            "download or export the file again.",
            f"Expected {file.metadata.sha256}\nFound    {found}",
        )


def data_sha256(path: Path) -> str:
    """SHA-256 of what follows the header of a safetensors file, in hexadecimal digits (ModelSpec's hash_sha256)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_student(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: StudentMetadata | None = None) -> Path:
    """Write an encoder file in the published dialect, with metadata, whole or not at all; returns its path.

    The tensors (published names) are checked as on loading. Raises StudentFileError for tensors that are no distilled T5, OSError when the
    disk does not take the file; in both cases nothing is left behind and an existing file stays as it was.
    """
    path = Path(path)
    metadata = metadata or StudentMetadata()
    layout = read_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path.name)
    dtype = _float_type({name: _safetensors_name(tensor.dtype) for name, tensor in tensors.items()}, path.name)
    check_finite(tensors, path.name)
    header = described(metadata, layout, FLOAT_NAMES[dtype])
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(ready, aside, metadata=header)
        _fill_in_hash(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _safetensors_name(dtype: torch.dtype) -> str:
    return {value: name for name, value in FLOATS.items()}.get(dtype, str(dtype))


def _fill_in_hash(path: Path) -> None:
    """Put the hash of the data into the header, in the place of the same length that was left for it, and onto the disk."""
    digest = data_sha256(path)
    place = f'"{HASH_KEY}":"{NO_HASH}"'.encode()
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(place) + len(place) - len(digest) - 1)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
