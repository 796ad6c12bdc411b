"""Trim Text Encoder: what stays of a large encoder's file, in every number format, and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import TRIMMED_KEY, StudentMetadata
from distilled_t5.encoder.trim import check_trimmed, read_trimmed, trim
from distilled_t5.families import FAMILIES, TRIMMABLE
from distilled_t5.runtime.errors import StudentFileError, UserError
from distilled_t5.runtime.header import read_header
from distilled_t5.students import KINDS
from distilled_t5.students.qwen3 import QWEN3
from distilled_t5.students.qwen3.layout import Qwen3Layout
from distilled_t5.train.commands import command_line, run_command
from safetensors.torch import load_file, save_file
from torch import Tensor

# Both of 36 layers, as published.
SMALL = {"4b": Qwen3Layout(16, 8, 36, 1, 1, vocab_size=40), "8b": Qwen3Layout(32, 8, 36, 1, 1, vocab_size=40)}
KLEIN, Z_IMAGE, KLEIN_9B = (FAMILIES[name] for name in ("flux2_klein_4b", "z_image", "flux2_klein_9b"))
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def small_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "qwen3", replace(QWEN3, named=lambda size, _width=None: SMALL[size]))


def bf16(size: str = "4b") -> dict[str, Tensor]:
    """A Qwen3 under the names of ComfyUI's files."""
    torch.manual_seed(0)
    shapes = SMALL[size].tensors().items()
    return {name.replace("encoder.", "model.", 1): torch.randn(shape).bfloat16() for name, shape in shapes}


def scaled_fp8() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name, tensor in bf16().items():
        projection = "_proj." in name
        tensors[name] = tensor.to(FP8) if projection else tensor
        if projection:
            tensors[name.replace(".weight", ".scale_weight")] = torch.ones(())
    return tensors


def four_bits() -> dict[str, Tensor]:
    """As ComfyUI's quantised layers: packed numbers, their scales, and a description of odd length."""
    tensors = bf16()
    for name in [name for name in tensors if "mlp." in name]:
        layer = name.removesuffix(".weight")
        tensors |= {name: torch.zeros(tensors[name].shape[0], tensors[name].shape[1] // 2, dtype=torch.uint8)}
        tensors |= {f"{layer}.comfy_quant": torch.zeros(21, dtype=torch.uint8), f"{layer}.weight_scale": torch.ones(3)}
    return tensors


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "qwen.safetensors") -> Path:
    save_file(tensors, folder / name, metadata)
    return folder / name


@pytest.mark.parametrize("family", TRIMMABLE.values(), ids=TRIMMABLE)
@pytest.mark.parametrize("form", [bf16, scaled_fp8, four_bits])
def test_the_layers_that_are_read_keep_every_byte_in_every_number_format(tmp_path: Path, family, form: Callable[..., dict[str, Tensor]]):
    tensors = bf16("8b") if form is bf16 and family is KLEIN_9B else form()
    if family is KLEIN_9B and form is not bf16:
        family = KLEIN
    source = written(tmp_path, tensors | {"lm_head.weight": torch.ones(40, 16)})
    out = trim(source, family, tmp_path / "trimmed.safetensors")
    found = load_file(out)
    layers = {int(name.split(".")[2]) for name in found if name.startswith("model.layers.")}
    assert layers == set(range(family.layers_read)) and "lm_head.weight" not in found
    gone = {name for name in tensors if name.startswith("model.layers.") and int(name.split(".")[2]) >= family.layers_read}
    assert found.keys() == tensors.keys() - gone
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(bytes_of(tensor), bytes_of(tensors[name])), name
    assert out.stat().st_size < source.stat().st_size
    assert read_header(out)[1][TRIMMED_KEY] == family.name and read_trimmed(out) and read_trimmed(source) is None


def test_what_the_metadata_says_of_layers_that_are_gone_is_removed_and_the_rest_stays(tmp_path: Path):
    said = {"layers": {f"model.layers.{layer}.mlp.up_proj": {"format": "float8_e4m3fn"} for layer in (3, 30)}}
    source = written(tmp_path, bf16(), {"_quantization_metadata": json.dumps(said), "author": "somebody"})
    strings = read_header(trim(source, KLEIN, tmp_path / "trimmed.safetensors"))[1]
    assert json.loads(strings["_quantization_metadata"]) == {"layers": {"model.layers.3.mlp.up_proj": {"format": "float8_e4m3fn"}}}
    assert strings["author"] == "somebody"
    assert strings["modelspec.title"].endswith("for FLUX.2 klein 4B: 27 of 36 layers")


def test_what_describes_the_source_file_alone_is_not_copied(tmp_path: Path):
    gone = ("modelspec.hash_sha256", "modelspec.date", "modelspec.description", "distilled_t5.header_sha256")
    source = written(tmp_path, bf16(), {**dict.fromkeys(gone, "0x12"), "modelspec.license": "apache-2.0"})
    strings = read_header(trim(source, KLEIN, tmp_path / "trimmed.safetensors"))[1]
    assert not strings.keys() & set(gone) and strings["modelspec.license"] == "apache-2.0"


@pytest.mark.parametrize("said", [{"layers": []}, {"layers": None}, [], None, 3, [["layers", 1]]], ids=json.dumps)
def test_a_description_of_quantised_layers_that_is_not_a_table_is_refused(tmp_path: Path, said: object):
    source = written(tmp_path, bf16(), {"_quantization_metadata": json.dumps(said)})
    with pytest.raises(StudentFileError, match=r"_quantization_metadata has no table of layers\.\nWhat to do: download"):
        trim(source, KLEIN, tmp_path / "trimmed.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen.safetensors"]


@pytest.mark.parametrize("change", [-2, 2])
def test_a_header_whose_offsets_do_not_match_its_shapes_is_refused(tmp_path: Path, change: int):
    source = written(tmp_path, bf16())
    content = source.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    table["model.norm.weight"]["data_offsets"][1] += change
    header = json.dumps(table).encode()
    source.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :] + bytes(2))
    with pytest.raises(StudentFileError, match=r"qwen\.safetensors is not a complete safetensors file"):
        trim(source, KLEIN, tmp_path / "trimmed.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen.safetensors"]


def test_a_source_that_cannot_be_read_is_not_reported_as_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch):
    source = written(tmp_path, bf16())
    opened, calls = Path.open, []

    def broken(path: Path, *arguments, **options):
        calls.extend([path] * (path == source))
        if len(calls) > 2 and path == source:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(StudentFileError, match=r"qwen\.safetensors could not be read: Input/output error\.\nWhat to do: "):
        trim(source, KLEIN, tmp_path / "trimmed.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen.safetensors"]


def test_a_trimmed_file_serves_what_reads_no_more_of_the_same_encoder_and_another_type_is_named(tmp_path: Path):
    files = {
        family: trim(written(tmp_path, bf16(size)), FAMILIES[family], tmp_path / f"{family}.safetensors")
        for family, size in (("z_image", "4b"), ("flux2_klein_4b", "4b"), ("flux2_klein_9b", "8b"))
    }
    for made_for, family, problem in (
        ("z_image", "z_image", ""),
        ("z_image", "flux2_klein_4b", ""),
        ("flux2_klein_4b", "flux2_klein_4b", ""),
        ("flux2_klein_4b", "z_image", "was trimmed for FLUX.2 klein 4B; the type is z_image.\nWhat to do: set type to flux2_klein_4b."),
        ("z_image", "flux", "was trimmed for Z-Image; the type is flux.\nWhat to do: set type to z_image or flux2_klein_4b."),
        ("flux2_klein_9b", "flux2_klein_4b", "; the type is flux2_klein_4b.\nWhat to do: set type to flux2_klein_9b."),
    ):
        found = read_trimmed(files[made_for])
        assert found
        if problem:
            with pytest.raises(StudentFileError) as refused:
                check_trimmed(*found, "a.safetensors", FAMILIES[family])
            assert problem in str(refused.value)
        else:
            check_trimmed(*found, "a.safetensors", FAMILIES[family])
    entries, _ = read_trimmed(files["z_image"]) or ({}, "")
    with pytest.raises(StudentFileError, match=r"What to do: trim the complete .* for Z-Image again"):
        check_trimmed({name: entries[name] for name in [*entries][:5]}, "z_image", "a.safetensors", Z_IMAGE)


def test_a_file_that_is_trimmed_for_z_image_can_be_trimmed_for_klein_but_not_again(tmp_path: Path):
    once = trim(written(tmp_path, bf16()), Z_IMAGE, tmp_path / "z.safetensors")
    twice = trim(once, KLEIN, tmp_path / "klein.safetensors")
    direct = trim(tmp_path / "qwen.safetensors", KLEIN, tmp_path / "direct.safetensors")
    assert twice.read_bytes() == direct.read_bytes()
    with pytest.raises(UserError, match=r"has no layer beyond the 27 that FLUX\.2 klein 4B reads\.\nWhat to do: use it as it is"):
        trim(twice, KLEIN, tmp_path / "again.safetensors")
    with pytest.raises(StudentFileError, match="88 of 387 tensors are missing"):
        trim(twice, Z_IMAGE, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def with_names(*names: str) -> Callable[[Path], Path]:
    return lambda folder: written(folder, bf16() | {name: torch.ones(2, 2) for name in names})


def student(folder: Path) -> Path:
    layout = Qwen3Layout(16, 8, 2, 1, 1, hidden_width=8, projected_width=2560)
    tensors = {name: torch.zeros(shape) for name, shape in layout.tensors().items()}
    return write_student(folder / "student.safetensors", tensors, StudentMetadata("z_image", 1, pooled="zero"))


def of_bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


VISION = with_names("model.visual.merger.linear_fc2.weight")
LORA = with_names("model.layers.0.mlp.up_proj.lora_A.weight")


@pytest.mark.parametrize(
    ("make", "family", "problem", "remedy"),
    [
        (
            lambda folder: written(folder, bf16("8b")),
            KLEIN,
            "the text encoder of FLUX.2 klein 9B",
            "set type to flux2_klein_9b, or",
        ),
        (lambda folder: written(folder, bf16()), KLEIN_9B, "the text encoder of Z-Image; expected", "set type to z_image or flux2_"),
        (student, KLEIN, "is a distilled Qwen3, which is read to its end; expected a", "pick the"),
        (VISION, KLEIN, "is a Qwen3-VL, with vision layers; expected a", "for image input keep the complete"),
        (LORA, KLEIN, "is a LoRA; expected a", "pick the"),
        (
            lambda folder: written(folder, {"shared.weight": torch.ones(2, 2)}),
            KLEIN,
            "299 of 299 tensors are missing",
            "pick the",
        ),
        (
            lambda folder: written(folder, bf16()),
            FAMILIES["flux"],
            "Flux.1 reads all layers of T5-XXL: none can be",
            "set type to one of z_",
        ),
        (of_bytes("a.gguf", b"GGUF" + bytes(64)), KLEIN, "is a GGUF file; expected .safetensors", "use the"),
        (of_bytes("a.safetensors", b"\x40" + bytes(7) + b"{"), KLEIN, "is not a complete safetensors file", "download"),
        (lambda folder: folder / "gone.safetensors", KLEIN, "does not exist", "refresh"),
    ],
    ids=["9B for 4B", "4B for 9B", "student", "vision", "LoRA", "incomplete", "T5", "GGUF", "cut off", "missing"],
)
def test_another_file_is_refused_with_what_to_do_and_nothing_is_written(tmp_path: Path, make, family, problem: str, remedy: str):
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        trim(source, family, tmp_path / "out.safetensors")
    assert problem in str(refused.value) and f"What to do: {remedy}" in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_cancelled_file_leaves_nothing_and_an_existing_one_stays(tmp_path: Path):
    source, out = written(tmp_path, bf16()), tmp_path / "out.safetensors"
    out.write_bytes(b"mine")

    def cancel(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trim(source, KLEIN, out, cancel)
    assert {path.name for path in tmp_path.iterdir()} == {"qwen.safetensors", "out.safetensors"}
    assert trim(source, KLEIN, out).name == "out_00002.safetensors" and out.read_bytes() == b"mine"


def test_the_command_writes_beside_the_file_and_says_how_much_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path, bf16())
    assert run_command(command_line().parse_args(["trim", str(source), "--type", "flux2_klein_4b"]), []) == 0
    out = tmp_path / "qwen-flux2_klein_4b.safetensors"
    assert f"Done: {out} (0.00 GB, of 0.00 GB)" in capsys.readouterr().out and read_trimmed(out)
    with pytest.raises(UserError, match=r"expected \.safetensors"):
        run_command(command_line().parse_args(["trim", str(source), "--type", "z_image", "--out", "a.bin"]), [])
    with pytest.raises(SystemExit):
        command_line().parse_args(["trim", str(source), "--type", "flux"])
    assert "choose from 'z_image', 'flux2_klein_4b', 'flux2_klein_9b'" in capsys.readouterr().err
