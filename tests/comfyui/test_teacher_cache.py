"""The teacher's texts on disk: a run takes them in the place of its teacher, with the same bits however they came there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import pytest
import torch
from distilled_t5.encoder.teacher import Teacher
from distilled_t5.families import FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.header import read_entries
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.runtime.stop import Stopped
from distilled_t5.tests.support.cache_runs import StopAfter, check_same_run, made, recipe, shards_of, texts_in
from distilled_t5.tests.support.exact import same
from distilled_t5.train import teacher_cache, workshop
from distilled_t5.train.batches import Schedule
from distilled_t5.train.cache_folder import description
from distilled_t5.train.cache_plan import expected, key_of, wanted
from distilled_t5.train.commands import command_line, run_command
from distilled_t5.train.estimate import estimate
from distilled_t5.train.models import load_teacher_of
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.rehearsal import Target, rehearse
from distilled_t5.train.rehearsal_report import cache_lines
from distilled_t5.train.run import train
from distilled_t5.train.teacher_cache import Rounding, open_cache
from distilled_t5.train.workshop import open_workshop

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache made in one go, and the run that made it."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(recipe(folder / "cache"), folder / "run", False, Ranks()) is not None
    return folder


def test_each_text_is_encoded_once_and_alone_before_the_diffusion_model_is_loaded(tmp_path, monkeypatch, capsys):
    events: list[Any] = []
    encode, load = Teacher.encode, workshop.load_frozen_model

    def watched(self: Teacher, prompts: Sequence[str], length: int, with_empty: bool = False) -> Any:
        events.append([(prompt, length) for prompt in prompts])
        return encode(self, prompts, length, with_empty)

    monkeypatch.setattr(Teacher, "encode", watched)
    monkeypatch.setattr(workshop, "load_frozen_model", lambda one: events.append("diffusion model") or load(one))
    opened = open_workshop(recipe(tmp_path / "cache"), Ranks())
    assert events[-1] == "diffusion model"
    texts = wanted(opened.schedule)
    assert sorted(text for event in events[:-1] for text in event if len(event) == 1 and text in texts.values()) == sorted(texts.values())
    batch, before = opened.schedule.batches(1, 0)[0], len(events)
    text = opened.teacher.encode(batch.prompts, batch.drawn.token_length)
    assert len(events) == before
    teacher = load_teacher_of(opened.recipe, None)
    alone = torch.cat([encode(teacher, [prompt], batch.drawn.token_length).text_BLD for prompt in batch.prompts])
    assert torch.equal(text.text_BLD, alone.bfloat16().float())
    said = capsys.readouterr().err
    assert f"0 of the run's {len(texts):,} are there; {len(texts):,} are encoded now and take at most" in said
    assert re.search(
        r"Rounding to bf16 changed these texts by 0\.17% .*, \d\.\d+% of their standard deviation, \d\.\d+% in the worst channel", said
    )


def test_a_run_that_finds_its_texts_loads_no_teacher_and_gives_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    def never(*_arguments: Any) -> Any:
        raise AssertionError("the teacher is not needed")

    for module in (workshop, teacher_cache):
        monkeypatch.setattr(module, "load_teacher_of", never)
    assert train(recipe(whole / "cache"), tmp_path / "run", False, Ranks()) is not None
    check_same_run(tmp_path / "run", whole / "run")
    said = capsys.readouterr().err
    assert "the teacher is not loaded" in said and f"its texts in {whole / 'cache'}" in said


def test_a_run_that_is_stopped_while_texts_are_encoded_keeps_them_and_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PER_SHARD", 4)
    one = recipe(tmp_path / "cache")
    assert train(one, tmp_path / "run", False, Ranks(), stop=StopAfter(8)) is None
    # Ids, pooled vector and text of each.
    assert sorted(len(read_entries(path)) // 3 for path in shards_of(tmp_path / "cache")) == [3, 4]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert '"state": "stopped"' in (tmp_path / "run" / "page.html").read_text(encoding="utf-8")
    # As after a kill: the next process finds what was complete.
    cache, first = made(one), made(recipe(whole / "cache"))
    assert not cache.missing()
    assert same(texts_in(cache, list(cache.wanted)), texts_in(first, list(first.wanted)))


def test_texts_are_the_same_whichever_run_has_made_them(whole, tmp_path):
    small, large = recipe(tmp_path / "cache", "stage.1.steps=5"), recipe(tmp_path / "cache", "stage.1.steps=40", "seed=1")
    made(small)
    made(large)
    cache, first = made(recipe(tmp_path / "cache")), made(recipe(whole / "cache"))
    assert len({path.parent for path in shards_of(tmp_path / "cache")}) == 1
    assert same(texts_in(cache, list(cache.wanted)), texts_in(first, list(first.wanted)))


def test_a_text_whose_bytes_have_changed_is_made_again_when_the_run_takes_it(whole, tmp_path, monkeypatch, caplog):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    one, [path] = recipe(tmp_path / "cache"), shards_of(tmp_path / "cache")
    [batch, *_] = Schedule(one).held_out_batches()
    first, *_ = batch.prompts
    cache = made(one)
    before, content, state = cache.encode(batch.prompts, batch.drawn.token_length), bytearray(path.read_bytes()), torch.get_rng_state()
    content[read_entries(path)[f"{key_of(first, batch.drawn.token_length)}.text"].begin] ^= 1
    path.write_bytes(content)
    assert same(vars(cache.encode(batch.prompts, batch.drawn.token_length)), vars(before))
    assert "its checksum differs.\nWhat to do: nothing, its texts are made again" in caplog.text
    assert torch.equal(torch.get_rng_state(), state), "dropout draws from it"
    assert not made(one).missing()
    monkeypatch.setattr(teacher_cache.TextShards, "read", damaged_always)
    with pytest.raises(UserError, match=r"if it is damaged once more, check the disk\."):
        cache.encode([first], batch.drawn.token_length)


def damaged_always(self: Any, key: str) -> Any:
    raise teacher_cache.DamagedShard(self.folder / "a.safetensors", "its checksum differs.")


# One of each kind: padded; not padded; in a chat template; and below, with rows of companions.
QUICK = ("flux", "pixart_alpha", "z_image")
ALONE = [pytest.param(one, False, id=name, marks=[pytest.mark.full] * (name not in QUICK)) for name, one in FAMILIES.items()]
WITH = [
    pytest.param(one, True, id=f"{name} with companions", marks=[pytest.mark.full] * (name != "sd3"))
    for name, one in FAMILIES.items()
    if one.companions
]


@pytest.mark.parametrize(("family", "companions"), [*ALONE, *WITH])
def test_texts_of_every_family_come_back_as_its_teacher_gives_them(family: Family, companions: bool, stand_ins, tmp_path):
    folder = stand_ins / "models" / "text_encoders"
    given = [f"teacher.{name}={folder / name}.safetensors" for name in family.companions if companions]
    side, length = max(64, family.least_side_px), max(16, family.token_length if family.padded else 0)
    guided = [] if family.name == "flux" else ["sampling.guidance=[]", "sampling.cfg=[4.5]"]
    sizes = [*(f"stage.{stage}.resolution_px={side}" for stage in (0, 1)), f"sampling.token_lengths=[{length}]"]
    base = "smoke-z-image" if family.kind.name == "qwen3" else "smoke"
    one = load_recipe(base, [f"diffusion_model.family={family.name}", f"teacher.cache={tmp_path}", *sizes, *guided, *given])
    prompts = ["a red cube", "a red cube left of a blue ball on a (small:1.2) table", ""]
    cache = open_cache(one, {key_of(prompt, length): (prompt, length) for prompt in prompts}, Ranks())
    teacher = load_teacher_of(one, None)
    ours, theirs = cache.encode(prompts, length, with_empty=True), teacher.encode(prompts, length, with_empty=True)
    assert torch.equal(ours.token_ids_BL, theirs.token_ids_BL) and ours.text_BLD.shape == theirs.text_BLD.shape
    torch.testing.assert_close(ours.text_BLD, theirs.text_BLD, rtol=2**-8, atol=1e-4)
    assert torch.equal(ours.pooled_BP, theirs.pooled_BP) and bool(ours.pooled_BP.any()) == companions
    assert (ours.rows is None) == (theirs.rows is None)
    if ours.rows is not None and theirs.rows is not None:
        assert ours.rows.own == theirs.rows.own
        for before, expected_KD in zip(ours.rows.before, theirs.rows.before, strict=True):
            assert torch.equal(before, expected_KD.bfloat16().float())
    assert ours.empty is not None and theirs.empty is not None and torch.equal(ours.empty.token_ids_BL, theirs.empty.token_ids_BL)
    torch.testing.assert_close(ours.empty.whole, theirs.empty.whole, rtol=2**-8, atol=1e-4)


def test_another_teacher_or_format_has_a_folder_of_its_own_and_what_differs_is_said(whole, stand_ins, tmp_path, capsys):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    prompts = {key_of("a", 16): ("a", 16)}
    for more, told in (("teacher.cache_format=fp8", "format bf16"), (f"teacher.clip_l={clip_l}", "teacher.clip_l none")):
        capsys.readouterr()
        open_cache(recipe(tmp_path / "cache", more), prompts, Ranks())
        assert f" has the texts of another teacher: {told}." in capsys.readouterr().err
    folders = {path.parent for path in shards_of(tmp_path / "cache")}
    assert len(folders) == 3
    assert len({json.loads((folder / "about.json").read_text(encoding="utf-8"))["tokenizers"] for folder in folders}) == 1


def test_flags_of_comfyui_that_decide_how_a_teacher_computes_are_part_of_it(tmp_path, monkeypatch):
    before = description(recipe(tmp_path))
    monkeypatch.setattr(comfy.cli_args.args, "fp16_text_enc", True)
    after = description(recipe(tmp_path))
    assert [key for key in before if before[key] != after[key]] == ["ComfyUI's flags"]


def test_a_resumed_run_that_finds_only_the_texts_of_another_teacher_is_refused_with_what_differs(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    one = recipe(tmp_path / "cache", "teacher.cache_format=fp8")
    refused = r"has no texts of the run's teacher(.|\n)*another teacher: format bf16\.\nWhat to do: put back"
    with pytest.raises(UserError, match=refused):
        open_cache(one, {key_of("a", 16): ("a", 16)}, Ranks(), resumed=True)
    assert len(shards_of(tmp_path / "cache")) == len(shards_of(whole / "cache"))


def test_texts_made_with_another_version_are_taken_and_this_is_said(whole, tmp_path, capsys):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    [about] = (tmp_path / "cache").glob("*/about.json")
    about.write_text(json.dumps(json.loads(about.read_text(encoding="utf-8")) | {"torch": "1.0"}), encoding="utf-8")
    assert not made(recipe(tmp_path / "cache")).missing()
    said = capsys.readouterr().err
    assert f"(made with torch 1.0, now {torch.__version__}: the last bits may differ); the teacher is not loaded" in said


def test_another_teacher_of_the_same_name_and_size_is_another_one(stand_ins, tmp_path):
    file = tmp_path / "clip_l.safetensors"
    given = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    content, largest = bytearray(given.read_bytes()), max(read_entries(given).values(), key=lambda entry: entry.size)
    found = []
    for _ in range(2):
        file.write_bytes(content)
        found.append(description(recipe(tmp_path, f"teacher.clip_l={file}")))
        content[(largest.begin + largest.end) // 2] ^= 1
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["teacher.clip_l"]


def test_a_run_goes_on_with_its_cache_in_another_folder_and_with_none_it_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "moved")
    run = tmp_path / "moved" / "run"
    with pytest.raises(ValueError, match=r"started with another recipe:\n.*teacher\.cache"):
        train(recipe(tmp_path, "teacher.cache="), run, True, Ranks())
    assert train(recipe(tmp_path / "moved" / "cache"), run, True, Ranks()) is not None
    history = (run / "recipe-history.jsonl").read_text(encoding="utf-8")
    assert "teacher.cache: " in history


def test_wrong_guidance_is_refused_before_a_text_is_encoded(stand_ins, tmp_path):
    model = stand_ins / "models" / "diffusion_models" / "flux1-schnell.safetensors"
    with pytest.raises(ValueError, match=r"flux1-schnell\.safetensors takes no guidance, but sampling\.guidance is 3\.5(.|\n)*What to do"):
        open_workshop(recipe(tmp_path / "cache", f"diffusion_model.file={model}", "sampling.guidance=[3.5]"), Ranks())
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"a cat")
    for place, what in ((tmp_path / "photos", "holds other files: cat.jpg"), (tmp_path / "photos" / "cat.jpg", "is a file")):
        with pytest.raises(UserError, match=rf"{what}; expected a folder of teacher's texts\.\nWhat to do: name an empty folder"):
            made(recipe(place))
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


@pytest.mark.skipif(os.name != "posix", reason="limits on the size of a file are POSIX")
def test_a_full_disk_keeps_complete_shards_and_says_what_is_needed(tmp_path, monkeypatch):
    import resource

    monkeypatch.setattr(teacher_cache, "PER_SHARD", 1)
    limits, write, one = resource.getrlimit(resource.RLIMIT_FSIZE), teacher_cache.TextShards.write, recipe(tmp_path / "cache")

    def third_does_not_fit(self: Any, texts: Any) -> None:
        if len(shards_of(tmp_path / "cache")) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        write(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.TextShards, "write", third_does_not_fit)
        try:
            with pytest.raises(UserError, match=r"and stay, the others need at most [\d.]+ MB\.\nWhat to do: free that .*fp8") as full:
                made(one)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = shards_of(tmp_path / "cache")
    assert len(done) == 2 and f": 2 of {len(wanted(Schedule(one)))} are there" in str(full.value)
    assert not list((tmp_path / "cache").rglob(".*"))
    assert not made(one).missing() and set(done) < set(shards_of(tmp_path / "cache"))
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"\(0\.0 MB are free\): 0 of \d+ are there"):
        made(recipe(tmp_path / "other"))


def test_a_rehearsal_counts_the_cache_once_and_says_its_size(tmp_path):
    one = recipe(tmp_path / "cache")
    found = rehearse(one, Target(CPU, as_gpu=True), with_time=True)
    plain = rehearse(one.with_cache(""), Target(CPU, as_gpu=True), with_time=True)
    # A step of two batches, of trajectories of two steps.
    each = sum(plain.stages[0].teacher_flops.values()) / one.stages[0].batch
    total = sum(stage.steps * sum(stage.teacher_flops.values()) for stage in found.stages)
    assert total == pytest.approx(each * expected(one, found.text_width).texts)
    [line] = cache_lines(one, found)
    assert line.startswith(
        f"Teacher's texts on disk: {expected(one, found.text_width)} in {tmp_path / 'cache'}; the hours include encoding them"
    )
    assert cache_lines(one.with_cache(""), plain) == []


@pytest.mark.full
def test_an_estimate_says_what_the_cache_takes_and_makes_none(tmp_path):
    said = estimate(recipe(tmp_path / "cache"), Ranks())
    assert re.search(r"Teacher's texts on disk: about .* hours before the first step, measured on \d+ texts\.", said)
    assert not (tmp_path / "cache").exists()


def test_the_command_needs_a_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"Recipe smoke has no cache\.\nWhat to do: name one, here and for training: --set teacher\.cache=FOLDER"
    ):
        run_command(command_line().parse_args(["cache", "smoke"]), [])


def test_a_stop_before_the_first_text_leaves_no_shard(tmp_path):
    with pytest.raises(Stopped):
        made(recipe(tmp_path / "cache"), lambda: True)
    assert not shards_of(tmp_path / "cache")


def test_rounding_is_reported_as_a_share_of_the_deviation_too_since_some_objectives_divide_by_the_variance():
    exact_BLD = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    exact_BLD[..., 0] = 100 + 0.1 * exact_BLD[..., 0]
    rounding = Rounding()
    for text_LD in exact_BLD:
        rounding.add(text_LD[None], text_LD[None].bfloat16().float())
    values, _, worst = rounding.shares()
    assert values < 0.001 and worst > 0.25
    deviation = exact_BLD[..., 0].double().flatten().std(unbiased=False)
    gap = (exact_BLD[..., 0].bfloat16().double() - exact_BLD[..., 0].double()).square().mean().sqrt()
    median = exact_BLD.double().flatten(0, 1).var(0, unbiased=False).median()
    assert worst == pytest.approx(float(gap / max(deviation, (0.1 * median).sqrt())))
