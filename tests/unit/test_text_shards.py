"""Teacher's texts in shards: what rounding keeps, what is stored once, and what a damaged, foreign or half-written shard does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.rows import Rows
from distilled_t5.encoder.teacher_text import TeacherText
from distilled_t5.encoder.text_shards import FORMATS, DamagedShard, TextShards, joined, packed, unpacked
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.header import read_entries
from distilled_t5.tests.support.exact import same
from safetensors import SafetensorError

FLUX, SD3, CHROMA = FAMILIES["flux"], FAMILIES["sd3"], FAMILIES["chroma"]
WIDTH = 64
BF16 = torch.bfloat16


def text(length: int = 12, seed: int = 0, before: int | None = None, pooled: int = 8) -> TeacherText:
    """One prompt's text. Channels differ a thousandfold, as T5-XXL's do; `before`: rows of companions, whose last half is zero."""
    random = torch.Generator().manual_seed(seed)
    text_BLD = torch.randn(1, length, WIDTH, generator=random) * torch.logspace(-2, 1, WIDTH)
    rows = None
    if before is not None:
        before_KD = torch.randn(before, WIDTH, generator=random)
        before_KD[:, WIDTH // 2 :] = 0
        rows = Rows((length,), (before_KD,))
    return TeacherText(torch.arange(2, 2 + length)[None], text_BLD, torch.randn(1, pooled, generator=random), rows)


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.002), ("fp8", 0.03)])
def test_a_text_comes_back_rounded_to_its_format(name, most):
    one = text()
    parts = packed(one, FORMATS[name])
    back = unpacked(parts, FLUX)
    assert torch.equal(back.token_ids_BL, one.token_ids_BL) and torch.equal(back.pooled_BP, one.pooled_BP) and back.rows is None
    error = (back.text_BLD - one.text_BLD).square().mean().sqrt() / one.text_BLD.square().mean().sqrt()
    assert 0 < error < most
    assert parts["text"].dtype == FORMATS[name] and back.text_BLD.dtype == torch.float32
    assert name != "bf16" or torch.equal(back.text_BLD, one.text_BLD.bfloat16().float())
    # What is rounded already stays as it is.
    assert same(packed(back, FORMATS[name])["text"].float(), parts["text"].float())


@pytest.mark.parametrize("name", FORMATS)
def test_equal_rows_are_stored_once_and_come_back(name):
    one = text(12)
    one.text_BLD[0, 5:11] = one.text_BLD[0, 5]
    one.text_BLD[0, 11:] = 0
    parts = packed(one, FORMATS[name])
    assert len(parts["text"]) == 7 and len(parts["text_row"]) == 12
    back = unpacked(parts, FLUX)
    assert torch.equal(back.text_BLD[0, 5:11], back.text_BLD[0, 5].expand(6, -1)) and not back.text_BLD[0, 11].any()
    alike = replace(one, text_BLD=one.text_BLD[:, [0, 5, 11]])
    assert torch.equal(back.text_BLD[:, [0, 5, 11]], unpacked(packed(alike, FORMATS[name]), FLUX).text_BLD)


def test_rows_of_companions_are_stored_without_the_channels_that_are_zero():
    one = text(12, before=3)
    parts = packed(one, BF16)
    assert parts["before"].shape == (3, WIDTH // 2)
    back = unpacked(parts, SD3)
    assert one.rows is not None and back.rows is not None and back.rows.own == (12,)
    assert torch.equal(back.rows.before[0], one.rows.before[0].bfloat16().float())


def test_texts_of_companions_that_are_absent_and_of_models_without_a_pooled_vector_come_back():
    none = unpacked(packed(text(12, before=0), BF16), SD3)
    assert none.rows is not None and none.rows.before[0].shape == (0, WIDTH)
    assert unpacked(packed(text(12, before=0, pooled=0), BF16), CHROMA).pooled_BP.shape == (1, 0)


def test_texts_of_several_lengths_are_joined_as_the_teacher_gives_them():
    batch = joined([text(5, seed=1, before=0), text(9, seed=2, before=0)], CHROMA)
    assert batch.text_BLD.shape == (2, 9, WIDTH) and not batch.text_BLD[0, 5:].any()
    assert batch.token_ids_BL[0].tolist() == [2, 3, 4, 5, 6, 0, 0, 0, 0]
    assert batch.rows is not None and batch.rows.own == (5, 9) and batch.pooled_BP.shape == (2, 8)


def shards_in(folder: Path, count: int = 3) -> TextShards:
    shards = TextShards(folder, "teacher")
    shards.write({f"12-{number}": packed(text(seed=number), BF16) for number in range(count)})
    return shards


def test_what_one_process_writes_another_finds(tmp_path):
    reader = TextShards(tmp_path, "teacher")
    shards_in(tmp_path)
    assert "12-1" not in reader
    reader.find()
    assert "12-1" in reader and same(dict(sorted(reader.read("12-1").items())), dict(sorted(packed(text(seed=1), BF16).items())))


def test_the_same_texts_are_the_same_file_whoever_writes_them(tmp_path):
    shards_in(tmp_path)
    [first] = tmp_path.iterdir()
    content = first.read_bytes()
    shards_in(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_a_shard_that_another_process_has_written_with_other_bits_stays_and_is_read(tmp_path):
    keys = [f"12-{number}" for number in range(3)]
    first, second = (TextShards(tmp_path, "teacher") for _ in range(2))
    for shards, seed in ((first, 0), (second, 10)):
        shards.write({key: packed(text(seed=seed + number), BF16) for number, key in enumerate(keys)})
    assert len(list(tmp_path.iterdir())) == 1
    for shards in (first, second):
        assert same(dict(sorted(shards.read(keys[1]).items())), dict(sorted(packed(text(seed=1), BF16).items())))


def test_a_shard_that_another_process_has_made_again_is_not_removed(tmp_path, caplog):
    shards = shards_in(tmp_path)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedShard) as damage:
        [shards.read(f"12-{number}") for number in range(3)]
    path.unlink()
    shards_in(tmp_path)
    shards.remove(damage.value)
    shards.find()
    assert "12-1" in shards and path.read_bytes() == content and not caplog.text


def test_a_folder_that_is_gone_is_not_damage(tmp_path):
    shards = shards_in(tmp_path / "texts")
    (tmp_path / "texts").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"texts, the folder of the teacher's texts, is gone\.\nWhat to do: connect its disk"):
        shards.read("12-1")


def test_a_shard_that_is_cut_off_is_removed_with_a_warning(tmp_path, caplog):
    shards_in(tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    again = TextShards(tmp_path, "teacher")
    again.find()
    assert "12-1" not in again and not path.exists()
    assert f"{path} is damaged: {path.name} is not a complete safetensors file" in caplog.text and "its texts are made again" in caplog.text


def test_a_changed_byte_is_noticed_in_the_text_that_has_it(tmp_path):
    shards = shards_in(tmp_path)
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[read_entries(path)["12-1.text"].begin + 7] ^= 1
    path.write_bytes(content)
    shards.read("12-0")
    with pytest.raises(DamagedShard, match="its checksum differs"):
        shards.read("12-1")


@pytest.mark.parametrize(("right", "wrong"), [(b'"BF16"', b'"B  6"'), (b'"dtype":"F32"', b'"dtyqe":"F32"'), (b"[12,64]", b"[12,-4]")])
def test_a_changed_header_is_noticed(tmp_path, right, wrong):
    shards = shards_in(tmp_path, 1)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    assert right in content
    path.write_bytes(content.replace(right, wrong, 1))
    with pytest.raises(DamagedShard):
        shards.read("12-0")


def test_a_shard_of_another_teacher_is_refused_with_its_place(tmp_path):
    shards_in(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"expected other, got teacher.\nWhat to do: move it to .*teacher.*, or delete it\."):
        TextShards(tmp_path / "teacher", "other").find()


@pytest.mark.skipif(os.name != "posix", reason="limits on the size of a file are POSIX")
def test_a_full_disk_leaves_the_complete_shards_alone(tmp_path):
    import resource

    shards = shards_in(tmp_path)
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises((OSError, SafetensorError), match="too large"):
            shards.write({f"12-{number}": packed(text(seed=number), BF16) for number in range(9, 19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before and "12-9" not in shards
