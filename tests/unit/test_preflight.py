"""Every file that a shipped recipe names comes with the pack or has an address; what a header says without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distilled_t5.config.files import SHIPPED
from distilled_t5.encoder.needed_tensors import check_teacher_tensors
from distilled_t5.prompts.corpora import PACK, SOURCES, PromptError, located
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.header import read_entries
from distilled_t5.runtime.model_folders import SHIPPED as MODELS
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.tiny_students import joined, published_file, tiny_tensors
from distilled_t5.train.preflight import SOURCES as MODEL_SOURCES
from distilled_t5.train.preflight import models_of
from distilled_t5.train.recipe import load_recipe

# Encoders that teach nothing here, as tensors by the names of Hugging Face, and what each is called.
XXL = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", None).tensors().items()}
XL = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xl", None).tensors().items()}
BIAS_OF_BLOCK_1 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
OTHER_TEACHERS = {
    "umT5-XXL": (XXL | {"shared.weight": (256384, 4096), BIAS_OF_BLOCK_1: (32, 64)}, "is a umT5 (a position bias in every block)"),
    "Pile-T5-XL": (XL | {BIAS_OF_BLOCK_1: (32, 32)}, "is a Pile-T5, AuraFlow's encoder (a position bias in every block)"),
    "mT5-XXL": (XXL | {"shared.weight": (250112, 4096)}, "has the vocabulary of mT5 (250,112 pieces)"),
    "ByT5-XXL": (XXL | {"shared.weight": (384, 4096)}, "has the vocabulary of ByT5 (384 pieces)"),
}
NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_a_shipped_recipe_comes_with_the_pack_or_has_an_address(name):
    nowhere = [
        model.name for one in load_recipe(name).each for model in models_of(one) if not (MODELS / model.folder / model.name).exists()
    ]
    assert not [model for model in nowhere if model not in MODEL_SOURCES]


@pytest.mark.parametrize("name", NAMES)
def test_every_corpus_of_a_shipped_recipe_comes_with_the_pack_or_has_an_address(name):
    corpora = [corpus for stage in load_recipe(name).stages for corpus in stage.corpora if corpus.path]
    elsewhere = [corpus for corpus in corpora if not (PACK / corpus.path).exists()]
    assert not [corpus.path for corpus in elsewhere if corpus.kind not in SOURCES and Path(corpus.path).name not in SOURCES]


def test_a_corpus_that_is_missing_is_refused_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PromptError, match="git clone https://github.com/Karine-Huang/T2I-CompBench " + f'"{tmp_path / "corpora" / "bench"}"'
    ):
        located("corpora/bench", "compbench")


@pytest.mark.parametrize(("shapes", "found"), OTHER_TEACHERS.values(), ids=OTHER_TEACHERS)
def test_a_teacher_of_another_kind_is_named_from_its_header(shapes, found):
    check_teacher_tensors(XXL, {}, "t5xxl.safetensors", ["clip_l"])
    with pytest.raises(StudentFileError) as caught:
        check_teacher_tensors(shapes, {}, "other.safetensors", ["clip_l"])
    assert f"other.safetensors {found}" in str(caught.value)


def test_a_header_is_read_without_torch_as_safetensors_reads_it(tmp_path):
    path, tensors = published_file(tmp_path / "a.safetensors", metadata={"title": "x"}), tiny_tensors()
    entries, content = read_entries(path), path.read_bytes()
    assert {name: entry.shape for name, entry in entries.items()} == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, entry in entries.items():
        assert content[entry.begin : entry.end] == tensors[name].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF" + bytes(100),
        (1 << 60).to_bytes(8, "little") + b"{}",
        joined(b"[1, 2]", b""),
        joined({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, b""),
        joined(json.dumps({"a": 5}).encode(), b""),
        joined(b"[" * 100_000, b""),
    ],
    ids=["empty", "GGUF", "long", "list", "offset", "number", "deep"],
)
def test_what_is_not_a_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(StudentFileError, match="not a complete safetensors file"):
        read_entries(path)


def test_a_file_that_is_cut_off_is_refused_with_both_sizes(tmp_path):
    path = published_file(tmp_path / "a.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StudentFileError, match=f"expected {size:,} bytes, got {size - 1:,}"):
        read_entries(path)
