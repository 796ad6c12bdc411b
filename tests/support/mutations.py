"""Ways to damage an encoder file, each a pure function of its bytes and of a random number generator."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from .tiny_students import joined, taken_apart

Mutation = Callable[[bytes, Random], bytes]

DTYPES = (
    "F16",
    "F32",
    "BF16",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I8",
    "I32",
    "I64",
    "U16",
    "BOOL",
    "C64",
    "bf16",
    "",
    7,
    None,
    ["BF16"],
)
NUMBERS = (-1, 0, 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 1.5, 1e300, "8", None, [8], {}, True)
TEXTS = (
    "",
    "none",
    "mlp",
    "0",
    "-1",
    "257",
    "1e9",
    "9" * 5000,
    "256 ",
    "\u0664\u0662",
    "\x00",
    "flux2",
    "0x" + "0" * 64,
    "0x" + "f" * 64,
    "z" * 64,
)
ODD_JSON = (
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00" * 9,
    b"NaN",
    b"{}",
    b"[]",
    b"null",
    b'"',
    b'{"\\ud800":1}',
    b"",
)


def flipped(data: bytes, rng: Random, start: int, stop: int, most: int = 4) -> bytes:
    """One to `most` bytes between `start` and `stop` get other values."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(start, stop)
        changed[place] ^= rng.randint(1, 255)
    return bytes(changed)


def header_end(file: bytes) -> int:
    """Where the data of a safetensors file begins."""
    return 8 + int.from_bytes(file[:8], "little")


def header_bytes(file: bytes, rng: Random) -> bytes:
    """Bytes of the header's text."""
    return flipped(file, rng, 8, header_end(file))


def length_prefix(file: bytes, rng: Random) -> bytes:
    """The eight bytes that say how long the header is."""
    if rng.random() < 0.5:
        return flipped(file, rng, 0, 8)
    length = rng.choice(
        (0, 1, 7, len(file) - 8, len(file), 2**24, 2**27, 2**40, 2**63, 2**64 - 1, header_end(file) - 8 + rng.randint(-9, 9))
    )
    return (length % 2**64).to_bytes(8, "little") + file[8:]


def tensor_bytes(file: bytes, rng: Random) -> bytes:
    """Bytes of the tensors."""
    return flipped(file, rng, header_end(file), len(file), most=8)


def cut_off(file: bytes, rng: Random) -> bytes:
    """The end is missing: anywhere, or a few bytes."""
    return file[: rng.choice((rng.randrange(len(file)), len(file) - rng.randint(1, 16), rng.randrange(header_end(file) + 1)))]


def lengthened(file: bytes, rng: Random) -> bytes:
    """Bytes too many, at the end, in front, or between header and data."""
    more = rng.randbytes(rng.choice((1, 8, 500)))
    place = rng.choice((0, header_end(file), len(file)))
    return file[:place] + more + file[place:]


def header_fields(file: bytes, rng: Random) -> bytes:
    """One to three fields of the header's table of tensors, the file being well-formed JSON or nearly so."""
    header, data = taken_apart(file)
    for _ in range(rng.randint(1, 3)):
        rng.choice((_dtype, _shape, _offsets, _name, _entry))(header, rng)
    text = json.dumps(header, separators=(",", ":")).encode()
    if rng.random() < 0.25:
        text = _spliced(text, rng)
    return joined(text, data)


def _entry_of(header: dict[str, Any], rng: Random) -> dict[str, Any]:
    entries = [entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
    return rng.choice(entries) if entries else {}


def _dtype(header: dict[str, Any], rng: Random) -> None:
    _entry_of(header, rng)["dtype"] = rng.choice(DTYPES)


def _shape(header: dict[str, Any], rng: Random) -> None:
    entry = _entry_of(header, rng)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or rng.random() < 0.1:
        entry["shape"] = rng.choice((None, 8, "8", {}, [], [[8]]))
        return
    place = rng.randrange(len(shape))
    changes = (
        shape[::-1],
        [*shape, 1],
        [1, *shape],
        [0, *shape],
        shape[:-1],
        [*shape[:place], rng.choice(NUMBERS), *shape[place + 1 :]],
        [2**32, 2**32],
        [1] * 2000,
    )
    entry["shape"] = rng.choice(changes)


def _offsets(header: dict[str, Any], rng: Random) -> None:
    entry, other = _entry_of(header, rng), _entry_of(header, rng)
    kind = rng.randrange(5)
    if kind == 0:
        entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
    elif kind == 1:
        entry["data_offsets"] = copy.copy(other.get("data_offsets"))
    elif kind == 2:
        entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif kind == 3:
        entry["data_offsets"] = rng.choice(([], [0], [0, 2, 4], "0,2", None, 5))
    elif isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = [number + rng.choice((-2, 2, 1)) if type(number) is int else number for number in entry["data_offsets"]]


def _name(header: dict[str, Any], rng: Random) -> None:
    names = [name for name in header if name != "__metadata__"]
    if len(names) < 2:
        return
    name, other = rng.sample(names, 2)
    kind = rng.randrange(6)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[name + rng.choice((".", "2", "\x00", "\u2028", "x" * 5000))] = header.pop(name)
    elif kind == 2:
        header[rng.choice(("module.", "encoder.", "t5base.", "")) + name.removeprefix("encoder.")] = header.pop(name)
    elif kind == 3:
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header[name.replace("block.1", f"block.{rng.choice((2, 7, 10**6, 10**30))}")] = header.pop(name)
    else:
        header[name + "_twin"] = header[name]


def _entry(header: dict[str, Any], rng: Random) -> None:
    name = rng.choice(list(header))
    header[name] = rng.choice((None, 7, [], {}, "x", {"dtype": "BF16"}, {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}))


def _spliced(text: bytes, rng: Random) -> bytes:
    """Something that no JSON writer makes: a key twice, bytes of no encoding, endless nesting, a second document."""
    place = rng.randrange(len(text))
    entry = b'"encoder.shared.weight":{"dtype":"BF16","shape":[40,8],"data_offsets":[0,640]},'
    return rng.choice(
        (
            text[:place] + rng.choice(ODD_JSON) + text[place:],
            b"{" + entry + text[1:],
            text[:-1] + b"," + entry[:-1] + b"}",
            text + b" " * rng.randint(1, 7),
            text + text,
            b" " + text,
            text.replace(b'"shape":', b'"shape":[8],"shape":', 1),
            text.replace(b'"__metadata__":', b'"__metadata__":{"distilled_t5.token_length":"7"},"__metadata__":', 1),
        )
    )


def metadata_fields(file: bytes, rng: Random) -> bytes:
    """One or two of the strings that the file says about itself, or the table that holds them."""
    header, data = taken_apart(file)
    metadata = header.get("__metadata__", {})
    for _ in range(rng.randint(1, 2)):
        keys = list(metadata) or ["format"]
        key = rng.choice(keys)
        kind = rng.randrange(5)
        if kind == 0:
            metadata.pop(key, None)
        elif kind == 1:
            metadata[key] = rng.choice(TEXTS)
        elif kind == 2:
            metadata[key[:-1] + rng.choice("abcx")] = metadata.pop(key, "")
        elif kind == 3:
            metadata[rng.choice(("distilled_t5.family", "distilled_t5.text_width", "distilled_t5.format_version"))] = rng.choice(TEXTS)
        else:
            metadata[key] = rng.choice((None, 7, True, ["x"], {"a": "b"}))
    header["__metadata__"] = rng.choice((metadata,) * 9 + ([], "x", None, 7))
    return joined(header, data)


def zip_bytes(file: bytes, rng: Random) -> bytes:
    """Bytes anywhere in a zip, or in its directory at the end, or its end missing, or more of it."""
    directory = max(file.rfind(b"PK\x05\x06") - 2500, 0)
    kind = rng.randrange(5)
    if kind == 0:
        return flipped(file, rng, 0, len(file), most=16)
    if kind in (1, 2):
        return flipped(file, rng, directory, len(file))
    if kind == 3:
        return file[: rng.randrange(len(file))]
    return file + rng.randbytes(rng.choice((1, 30, 70_000)))


def zip_records(file: bytes, rng: Random) -> bytes:
    """The records of a zip written anew with right checksums: some changed, dropped, doubled, exchanged or compressed."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    place, other = rng.sample(range(len(records)), 2)
    name, content = records[place]
    kind = rng.randrange(7)
    if kind <= 2:
        place = next(index for index, (record, _) in enumerate(records) if record.endswith("data.pkl"))
        records[place] = (records[place][0], flipped(records[place][1], rng, 0, len(records[place][1]), most=3))
    elif kind == 3:
        del records[place]
    elif kind == 4:
        records[place], records[other] = (name, records[other][1]), (records[other][0], content)
    elif kind == 5:
        records[place] = (name, content[: rng.randint(0, len(content))])
    else:
        records.append((records[other][0] + rng.choice(("", "2")), content))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for record, part in records:
            archive.writestr(zipfile.ZipInfo(record), part, compress_type=method)
    return made.getvalue()


SAFETENSORS_MUTATIONS: dict[str, Mutation] = {
    "header bytes": header_bytes,
    "header fields": header_fields,
    "metadata": metadata_fields,
    "tensor bytes": tensor_bytes,
    "length prefix": length_prefix,
    "cut off": cut_off,
    "lengthened": lengthened,
}
ZIP_MUTATIONS: dict[str, Mutation] = {"zip bytes": zip_bytes, "zip records": zip_records}
