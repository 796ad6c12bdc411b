"""What a file says about itself, and what happens when that is not true."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import safetensors
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.metadata import (
    HASH_KEY,
    HEADER_HASH_KEY,
    MAX_TOKENS,
    VERSION_KEY,
    StudentMetadata,
    described,
    read_metadata,
    served_as,
)
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.weights import data_sha256
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.tiny_students import TINY, joined, published_file, taken_apart, tiny_tensors

NARROW = StudentLayout(d_model=8, d_ff=12, num_layers=1, num_heads=2, d_kv=4, vocab_size=40, hidden_width=10, projected_width=16)
PLAIN = StudentLayout(d_model=16, d_ff=12, num_layers=1, num_heads=2, d_kv=4, vocab_size=40)


def header_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def with_metadata(path: Path, metadata: dict[str, str], layout: StudentLayout = TINY) -> Path:
    return published_file(path, tiny_tensors(layout), {VERSION_KEY: "1", **metadata})


def refusal(path: Path) -> str:
    with pytest.raises(StudentFileError) as caught:
        open_student(path)
    message = str(caught.value)
    assert message.startswith(path.name)
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"format": "pt", "modelspec.author": "somebody"}])
def test_file_without_our_metadata_is_the_authors(header, tmp_path):
    metadata = open_student(published_file(tmp_path / "file.safetensors", metadata=header)).metadata
    assert (metadata.family, metadata.token_length, metadata.pooled, metadata.projection) == ("flux", 256, "clip_l", "mlp")
    assert not metadata.described


@pytest.mark.parametrize(
    ("layout", "metadata"),
    [
        (TINY, StudentMetadata()),
        (TINY, StudentMetadata(token_length=77, pooled="zero", title="My student")),
        (NARROW, StudentMetadata(text_width=16)),
        (NARROW, StudentMetadata("chroma", 1, "zero", also_serves=("pixart_sigma", "pixart_alpha"), text_width=16, title="Mine")),
        (PLAIN, StudentMetadata(projection="none", text_width=16)),
        (
            TINY,
            StudentMetadata(facts={"distilled_t5.teacher": "t5xxl_fp16", "modelspec.license": "Apache-2.0", "note": '\u4f60\u597d "x"\n'}),
        ),
    ],
)
def test_metadata_survives_writing_and_reading(layout, metadata, tmp_path):
    path = write_student(tmp_path / "file.safetensors", tiny_tensors(layout), metadata)
    found = open_student(path).metadata
    for name in ("family", "also_serves", "token_length", "pooled", "projection", "text_width"):
        assert getattr(found, name) == getattr(metadata, name)
    assert found.title == (metadata.title or f"Distilled {layout.size_name} for Flux.1")
    assert metadata.facts.items() <= found.facts.items()
    assert found.described


def test_written_header_follows_modelspec(tmp_path):
    path = write_student(tmp_path / "file.safetensors", tiny_tensors())
    header = header_of(path)
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "flux-1/text-encoder"
    assert header["modelspec.title"] == "Distilled T5 of width 8, 2 layers for Flux.1"
    assert header["modelspec.date"].endswith("Z")
    written = datetime.strptime(header["modelspec.date"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(written.tzinfo) - written).total_seconds()) < 600
    assert header[HASH_KEY] == "0x" + data_sha256(path)
    assert header["format"] == "pt"
    assert all(header[key] for key in ("modelspec.description", "modelspec.implementation", "modelspec.usage_hint", "modelspec.tags"))
    assert "bf16" in header["modelspec.description"]


def test_saving_again_carries_the_facts_and_rewrites_the_rest(tmp_path):
    first = StudentMetadata(token_length=99, facts={"distilled_t5.steps": "70000", "modelspec.author": "me", "modelspec.date": "1999"})
    once = open_student(write_student(tmp_path / "once.safetensors", tiny_tensors(), first))
    merged = replace(once.metadata, facts={**once.metadata.facts, "distilled_t5.merged": "yes"})
    again = open_student(write_student(tmp_path / "again.safetensors", once.load(), merged))
    assert again.metadata.token_length == 99
    kept = {"distilled_t5.steps": "70000", "modelspec.author": "me", "distilled_t5.merged": "yes"}
    assert again.metadata.facts == kept
    assert header_of(again.path)["modelspec.date"] != "1999"


def test_output_width_of_another_diffusion_model_is_not_called_wrong_metadata(tmp_path):
    plain_flux = published_file(tmp_path / "narrow.safetensors", tiny_tensors(NARROW))
    message = refusal(plain_flux)
    assert "width 16" in message
    assert "4096" in message
    assert "flux" in message


@pytest.mark.parametrize("named", ["sd3", "pixart", "chroma", "pixart_sigma,pixart_alpha"])
def test_a_file_can_serve_only_families_with_the_same_teacher_and_padding(named, tmp_path):
    header = {"distilled_t5.family": "chroma", "distilled_t5.also_serves": named}
    assert "some of the families with the same teacher and padding (pixart_alpha, pixart_sigma)" in refusal(
        with_metadata(tmp_path / "wrong.safetensors", header)
    )


def test_a_file_is_served_as_each_family_that_it_names_and_no_other():
    metadata = StudentMetadata("pixart_sigma", 1, "zero", also_serves=("chroma",))
    as_chroma = served_as(metadata, FAMILIES["chroma"], "file")
    assert (as_chroma.family, as_chroma.also_serves) == ("chroma", ("pixart_sigma",))
    assert served_as(as_chroma, FAMILIES["pixart_sigma"], "file") == metadata
    three = StudentMetadata("sd3", 77, "clip_l+clip_g", also_serves=("flux",))
    assert served_as(three, FAMILIES["flux"], "file").pooled == "clip_l", "a file saved so can be read"
    with pytest.raises(
        StudentFileError, match=r"for PixArt-Sigma and Chroma; the type is flux\.\nWhat to do: set type to pixart_sigma or chroma"
    ):
        served_as(metadata, FAMILIES["flux"], "file")


@pytest.mark.parametrize(
    ("value_of", "expected"),
    [
        ({"distilled_t5.family": "sdxl"}, "one of flux"),
        ({"distilled_t5.family": ""}, "one of flux"),
        ({"distilled_t5.also_serves": "chroma"}, "some of the families with the same teacher and padding (sd3)"),
        *(
            ({"distilled_t5.token_length": value}, f"from 1 to {MAX_TOKENS}")
            for value in ("0", "-1", "4097", "many", "2.5", "", "1" * 5000, " 256")
        ),
        ({"distilled_t5.token_length": "\u0662\u0665\u0666"}, "an integer"),
        ({"distilled_t5.pooled": "clip_g"}, "one of clip_l, zero"),
        ({"distilled_t5.projection": "linear"}, "one of mlp, none"),
        ({"distilled_t5.projection": "none"}, "a projection"),
        ({"distilled_t5.text_width": "0"}, "an integer from 1"),
        ({"distilled_t5.text_width": "128"}, "width 4096"),
        ({HASH_KEY: "0x1234"}, "64 hexadecimal digits"),
        ({HASH_KEY: "g" * 64}, "64 hexadecimal digits"),
        ({HEADER_HASH_KEY: "no"}, "64 hexadecimal digits"),
    ],
)
def test_each_invalid_value_is_refused_and_named(value_of, expected, tmp_path):
    message = refusal(with_metadata(tmp_path / "wrong.safetensors", value_of))
    ((key, value),) = value_of.items()
    assert key in message
    assert repr(value[:60])[:-1] in message or value in message
    assert expected in message
    assert len(message) < 1000


def test_metadata_with_a_projection_that_the_tensors_lack(tmp_path):
    message = refusal(with_metadata(tmp_path / "wrong.safetensors", {"distilled_t5.text_width": "16"}, PLAIN))
    assert "no projection" in message
    assert "'mlp'" in message


def test_t5_without_projection_is_served_only_if_its_metadata_says_so(tmp_path):
    told = with_metadata(tmp_path / "told.safetensors", {"distilled_t5.projection": "none", "distilled_t5.text_width": "16"}, PLAIN)
    assert open_student(told).layout == PLAIN
    message = refusal(published_file(tmp_path / "untold.safetensors", tiny_tensors(PLAIN)))
    assert "without a projection" in message
    assert "distilled_t5.projection = none" in message


def test_our_keys_without_our_version_are_refused(tmp_path):
    message = refusal(published_file(tmp_path / "file.safetensors", metadata={"distilled_t5.token_length": "77"}))
    assert "distilled_t5.token_length" in message
    assert VERSION_KEY in message


@pytest.mark.parametrize("version", ["0", "2", "", "one"])
def test_other_format_versions_are_refused_with_the_one_that_is_read(version, tmp_path):
    message = refusal(published_file(tmp_path / "file.safetensors", metadata={VERSION_KEY: version}))
    assert repr(version) in message
    assert "version 1" in message
    assert "update" in message


def test_hash_may_be_written_with_or_without_0x_and_in_capitals(tmp_path):
    digest = data_sha256(published_file(tmp_path / "file.safetensors"))
    for value in (digest, "0x" + digest, "0X" + digest.upper()):
        path = with_metadata(tmp_path / "hashed.safetensors", {HASH_KEY: value})
        assert open_student(path).load().keys() == TINY.tensors().keys()


@pytest.mark.parametrize("version", [{VERSION_KEY: "1"}, {}], ids=["ours", "another tool's"])
def test_hash_of_other_data_is_refused_whoever_wrote_it(version, tmp_path):
    path = published_file(tmp_path / "file.safetensors", metadata={**version, HASH_KEY: "0x" + "ab" * 32})
    with pytest.raises(
        StudentFileError, match=r"file.safetensors was changed or damaged(.|\n)*Expected abab(.|\n)*Got (.|\n)*What to do: "
    ):
        open_student(path).load()


def test_header_that_was_changed_after_writing_is_refused(tmp_path):
    written = write_student(tmp_path / "file.safetensors", tiny_tensors(), StudentMetadata(token_length=77)).read_bytes()
    header, data = taken_apart(written)
    shapes = "encoder.encoder.block.0.layer.0.SelfAttention.{}.weight"

    def refuses(changed: dict) -> None:
        path = tmp_path / "changed.safetensors"
        path.write_bytes(joined(changed, data))
        with pytest.raises(StudentFileError, match=r"changed.safetensors was changed or damaged(.|\n)*What to do: "):
            open_student(path).load()

    refuses({**header, shapes.format("q"): header[shapes.format("k")], shapes.format("k"): header[shapes.format("q")]})
    refuses({name: {**entry, "dtype": "F16"} if "wi_1" in name else entry for name, entry in header.items()})
    refuses({**header, "__metadata__": {**header["__metadata__"], "distilled_t5.token_length": "78"}})
    retitled = tmp_path / "retitled.safetensors"
    retitled.write_bytes(joined({**header, "__metadata__": {**header["__metadata__"], "modelspec.title": "Mine"}}, data))
    assert open_student(retitled).load().keys() == TINY.tensors().keys()
    assert open_student(retitled).metadata.title == "Mine"


def test_header_to_be_written_can_be_read():
    metadata = StudentMetadata(token_length=128, pooled="zero", facts={"distilled_t5.steps": "5"})
    found = read_metadata(described(metadata, TINY, "fp16"), "file")
    assert (found.token_length, found.pooled, found.facts) == (128, "zero", {"distilled_t5.steps": "5"})
    assert re.fullmatch("0{64}", found.sha256 or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_description_names_the_dtype(dtype, tmp_path):
    path = write_student(tmp_path / "file.safetensors", tiny_tensors(dtype=dtype))
    names = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8_e4m3fn",
        torch.float8_e5m2: "fp8_e5m2",
    }
    assert names[dtype] in header_of(path)["modelspec.description"]
    assert open_student(path).dtype == dtype
