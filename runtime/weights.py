"""Weight files: which formats are read, what a header says, tensors by name, and whether their numbers are finite."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .errors import StudentFileError, listed, printable
from .failure import is_of_the_driver, is_out_of_memory
from .progress import Progress, silent

Shape = tuple[int, ...]
SAFETENSORS = (".safetensors", ".sft")
# The files of torch.save can run code, or exhaust the memory, when they are read.
TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt")
GGUF = b"GGUF"
# In the order in which the safetensors library writes them.
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
FLOATS = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
DTYPES = {
    **FLOATS,
    **{f"I{dtype.itemsize * 8}": dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8)},
    "F64": torch.float64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}
# Number formats that a user can choose for weights.
CHOICES = {name: dtype for dtype, name in FLOAT_NAMES.items() if dtype != torch.float8_e5m2}
DAMAGED = "download the file again, or use an earlier checkpoint: such weights give black or broken images."
CHUNK_BYTES = 1 << 22
# Parsing takes a second for each 6 MB of tensors; the largest text encoders have some thousand tensors, and 0.3 MB.
MOST_HEADER_BYTES = 8_000_000
MOST_TENSORS = 20_000


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str], dict[str, str]]:
    """Shapes and safetensors dtype names of the tensors, by name, and the metadata. Raises StudentFileError."""
    check_readable(path)
    with reading(path), safetensors.safe_open(str(path), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        return shapes, {name: part.get_dtype() for name, part in slices.items()}, dict(file.metadata() or {})


def load_tensors(path: Path, names: Iterable[str] | None = None, progress: Progress = silent) -> dict[str, Tensor]:
    """Tensors of a file on the CPU by name in the file: those of `names`, or all. Raises StudentFileError.

    They are read, not mapped into memory: if a mapped file becomes shorter, the system ends the process.
    """
    shapes, dtypes, _ = read_header(path)
    wanted = list(shapes if names is None else names)
    unknown = [f"{name}: {dtypes[name]}" for name in wanted if dtypes.get(name, "F32") not in DTYPES]
    if unknown:
        raise StudentFileError(f"{path.name} has number formats that cannot be read.", "export the file again in bf16.", listed(unknown))
    tensors: dict[str, Tensor] = {}
    with reading(path), path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER_BYTES))
        try:
            entries = json.loads(header)
            places = {name: (entries[name]["data_offsets"][0], shapes[name], DTYPES[dtypes[name]]) for name in wanted}
        except (LookupError, TypeError, ValueError) as error:
            raise changed(path) from error
        for name, (begin, shape, dtype) in places.items():
            tensors[name] = torch.empty(shape, dtype=dtype)
            numbers = tensors[name].reshape(-1).view(torch.uint8).numpy().data
            file.seek(8 + len(header) + begin)
            if file.readinto(numbers) != len(numbers):
                raise changed(path)
            progress(len(tensors), len(wanted))
    return tensors


def changed(path: Path) -> StudentFileError:
    """The error about a file that another program writes while it is read."""
    return StudentFileError(f"{path.name} changed while it was read.", "wait until it is written, then run again.")


def check_readable(path: Path) -> None:
    """Raise StudentFileError unless the path is a file with content and with the ending of a safetensors file."""
    with reading(path):
        str(path).encode()
        if path.is_dir():
            raise StudentFileError(f"{path.name} is a folder; expected a .safetensors file.", "pick a file, such as one inside the folder.")
        if not path.is_file():
            raise StudentFileError(f"{path.name} does not exist.", "refresh the file list (key R) and pick a file that is listed.")
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes, most = int.from_bytes(start, "little"), min(MOST_HEADER_BYTES, path.stat().st_size - len(start))
            tensors = file.read(header_bytes).count(b'"data_offsets"') if header_bytes <= most else 0
    if not start:
        raise StudentFileError(f"{path.name} is empty (0 bytes).", "download the file again.")
    ending = path.suffix.lower()
    if ending == ".gguf" or start.startswith(GGUF):
        raise StudentFileError(
            f"{path.name} is a GGUF file; expected .safetensors.",
            "use the .safetensors file (it is small already), or load a GGUF T5-XXL with the nodes of ComfyUI-GGUF.",
        )
    if ending in TORCH_FILES:
        raise StudentFileError(f"{path.name} is a file of torch.save; expected .safetensors.", conversion(path))
    if ending not in SAFETENSORS:
        raise StudentFileError(f"{path.name} has the ending {ending!r}; expected .safetensors.", "pick another file.")
    if MOST_HEADER_BYTES < header_bytes <= path.stat().st_size:
        raise StudentFileError(
            f"{path.name} has a header of {header_bytes:,} bytes; expected at most {MOST_HEADER_BYTES:,}.",
            "export the file again without what other programs added to its metadata, or pick another file.",
        )
    if tensors > MOST_TENSORS:
        raise StudentFileError(f"{path.name} holds {tensors:,} tensors; expected at most {MOST_TENSORS:,}.", "pick another file.")


def conversion(path: Path) -> str:
    """The command that converts a file of torch.save, as advice; it writes the new file beside the old one."""
    read = f"comfy.utils.load_torch_file(r'{path.absolute()}', safe_load=True)"
    write = f"s.save_file({{name: w.clone().contiguous() for name, w in t.items()}}, r'{path.absolute().with_suffix(SAFETENSORS[0])}')"
    return (
        "convert it, in ComfyUI's folder with the Python that runs ComfyUI: "
        f'python -c "import comfy.utils, safetensors.torch as s; t = {read}; {write}"'
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise StudentFileError for a file that cannot be read; with advice, MemoryError for one that does not fit into memory, and
    RuntimeError for an error of the GPU's driver."""
    try:
        yield
    except UnicodeError as error:
        raise StudentFileError(f"{path.name}: its path is not valid Unicode.", "rename the file or its folder.") from error
    except (OSError, safetensors.SafetensorError, RuntimeError, MemoryError) as error:
        raise _not_read(path, error) from error


def _not_read(path: Path, error: Exception) -> Exception:
    found, name = printable(str(error)), printable(path.name)
    if is_out_of_memory(error):
        return MemoryError(
            f"Not enough memory to read {name}: {found}\nWhat to do: close other programs, or unload other models, then run again."
        )
    if is_of_the_driver(error, str(path)):
        return RuntimeError(f"{name} could not be read: {found}\nWhat to do: check the GPU and its driver.")
    if isinstance(error, OSError):
        reason = error.strerror or error
        remedy = "check that the file and its folder exist and that ComfyUI may read them."
        return StudentFileError(f"{name} could not be read: {reason}.", remedy)
    # RuntimeError: torch could not map the file, or has no dtype for a number format that the file names.
    size = path.stat().st_size if path.is_file() else 0
    return StudentFileError(
        f"{name} is not a complete safetensors file ({size:,} bytes).",
        "download it again; it may have been cut off or renamed.",
        f"Found: {found}",
    )


def dtype_name(tensor: Tensor) -> str:
    """The name that safetensors files have for a tensor's number format."""
    return SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype))


def widest_float(dtypes: Mapping[str, str], where: str) -> torch.dtype:
    """The dtype that holds the numbers of all tensors, from safetensors dtype names by tensor name.

    Raises StudentFileError that lists the tensors that are not floating point.
    """
    odd = [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    if odd:
        raise StudentFileError(
            f"{where}: {len(odd)} tensors are not floating point; expected {', '.join(FLOATS)}.",
            "export the file again in bf16. A file that was quantised for another program cannot be read here.",
            listed(odd),
        )
    found = {FLOATS[dtype] for dtype in dtypes.values()}
    widest = max(found, key=lambda dtype: dtype.itemsize)
    # Of two formats of one size, neither holds the other's numbers.
    rivals = {dtype for dtype in found if dtype.itemsize == widest.itemsize}
    return widest if len(rivals) == 1 else torch.float32


def check_finite(tensors: Mapping[str, Tensor], where: str, progress: Progress = silent, remedy: str = DAMAGED) -> None:
    """Raise StudentFileError that lists every tensor with a NaN or an infinity."""
    broken = not_finite(tensors, progress)
    if broken:
        raise StudentFileError(f"{where}: {len(broken)} tensors hold NaN or infinity.", remedy, listed(broken))


def not_finite(tensors: Mapping[str, Tensor], progress: Progress = silent) -> list[str]:
    """Names of the tensors with a NaN or an infinity."""
    broken = []
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        # torch has no isfinite for 8-bit floats; as 16-bit floats their NaN and infinity stay what they are.
        numbers = tensor.to(torch.float16) if tensor.element_size() == 1 else tensor
        # aminmax passes NaN on, and needs no copy of the tensor.
        if numbers.numel() and not torch.isfinite(torch.stack(torch.aminmax(numbers))).all():
            broken.append(name)
        progress(done, len(tensors))
    return broken


def data_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of what follows the header of a safetensors file, in hexadecimal digits (ModelSpec's hash_sha256)."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(file.tell(), total)
    return digest.hexdigest()
