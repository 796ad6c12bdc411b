"""Where a student starts: T5 as transformers saves it, whole and of the right kind, or a sentence that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from distilled_t5.encoder.files import write_student
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.students.t5.trained import DistilledT5, transformers_config
from distilled_t5.tests.support.exact import same
from distilled_t5.train.student_start import make_student
from transformers import T5EncoderModel, T5ForConditionalGeneration

GATED = StudentLayout(d_model=16, d_ff=24, num_layers=2, num_heads=3, d_kv=4, vocab_size=40, hidden_width=8, projected_width=12)
PLAIN = dataclasses.replace(GATED, gated=False)
TOKENS_BL = torch.tensor([[5, 17, 39, 2, 1, 0, 0, 0]])
ONE_SHARD, SHARDS = "5GB", "4KB"
INDEX = "model.safetensors.index.json"


def saved(folder: Path, model_class: Any = T5EncoderModel, layout: StudentLayout = GATED, size: str = SHARDS) -> Any:
    """A random T5 that transformers saved into the folder; returns the model."""
    torch.manual_seed(1)
    model = model_class(transformers_config(layout)).eval()
    model.save_pretrained(folder, max_shard_size=size)
    return model


def untied(one_token_table: bool) -> Any:
    """A T5 with a head of its own; its token tables are equal, as in T5 v1.1, or each another."""
    torch.manual_seed(1)
    config = transformers_config(GATED)
    config.tie_word_embeddings = False
    model: Any = T5ForConditionalGeneration(config).eval()
    if one_token_table:
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.load_state_dict(model.shared.state_dict())
    return model


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.encoder(input_ids=TOKENS_BL).last_hidden_state


def starts_as(folder: Path, model: Any, layout: StudentLayout = GATED) -> bool:
    """Whether a student that starts from the folder encodes as the model does, to the bit, behind a random projection."""
    student, fresh = (cast(DistilledT5, make_student(layout, start, 0.1, seed=0)) for start in (str(folder), "random"))
    student.eval()
    assert same(student.final_projection.state_dict(), fresh.final_projection.state_dict())
    return torch.equal(hidden(student.encoder), hidden(model))


def refusal(start: Path, layout: StudentLayout = GATED) -> str:
    with pytest.raises(ValueError, match="What to do: ") as caught:
        make_student(layout, str(start), 0.1, seed=0)
    message = str(caught.value)
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


@pytest.mark.parametrize("layout", [GATED, PLAIN], ids=["gated", "relu"])
@pytest.mark.parametrize("size", [ONE_SHARD, SHARDS])
@pytest.mark.parametrize("model_class", [T5EncoderModel, T5ForConditionalGeneration])
def test_a_student_starts_as_the_t5_that_transformers_saved_whole_or_in_shards(tmp_path, model_class, size, layout):
    model = saved(tmp_path, model_class, layout, size)
    assert (tmp_path / INDEX).exists() == (size == SHARDS)
    assert starts_as(tmp_path, model, layout)


@pytest.mark.parametrize("size", [ONE_SHARD, SHARDS])
def test_a_head_of_its_own_is_left_aside(tmp_path, size):
    model = untied(one_token_table=True)
    model.save_pretrained(tmp_path, max_shard_size=size)
    held = [name for file in tmp_path.glob("*.safetensors") for name in safetensors.torch.load_file(file)]
    assert "lm_head.weight" in held
    assert starts_as(tmp_path, model)


def test_bin_files_are_refused_with_a_command_that_converts_them(tmp_path):
    saved(tmp_path, size=ONE_SHARD)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "expected model.safetensors" in message
    assert f"T.from_pretrained(r'{tmp_path}').save_pretrained" in message
    assert "is a file of torch.save" in refusal(tmp_path / "pytorch_model.bin")


def test_a_student_starts_from_the_file_itself_and_from_one_with_the_token_table_under_its_other_name(tmp_path):
    model = saved(tmp_path, size=ONE_SHARD)
    file = tmp_path / "model.safetensors"
    assert starts_as(file, model)
    tensors = safetensors.torch.load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors.torch.save_file(tensors, file)
    assert starts_as(file, model)


def test_a_distilled_file_is_taken_with_its_projection(tmp_path):
    student = DistilledT5(GATED)
    start = make_student(GATED, str(write_student(tmp_path / "student.safetensors", student.tensors())), 0.1, seed=3)
    assert same(start.tensors(), student.tensors())


def without_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    return f"1 of the 6 shards that {INDEX} names are not in {folder}.\n  {shard.name}"


def with_a_tensor_too_many(folder: Path) -> str:
    shard = min(folder.glob("model-*.safetensors"))
    safetensors.torch.save_file(safetensors.torch.load_file(shard) | {"shared.weigth": torch.zeros(1)}, shard)
    return f"shared.weigth: in {shard.name}, unknown to the index"


def with_a_tensor_less(folder: Path) -> str:
    name, shard = next(iter(json.loads((folder / INDEX).read_text())["weight_map"].items()))
    tensors = safetensors.torch.load_file(folder / shard)
    del tensors[name]
    safetensors.torch.save_file(tensors, folder / shard)
    return f"{name}: expected in {shard}, missing"


def with_an_index_that_lacks_a_tensor_of_both(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"].pop("shared.weight")
    tensors = safetensors.torch.load_file(folder / shard)
    del tensors["shared.weight"]
    safetensors.torch.save_file(tensors, folder / shard)
    (folder / INDEX).write_text(json.dumps(index))
    return "encoder.shared.weight: missing"


def cut_off(folder: Path) -> str:
    shard = min(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    return f"{shard.name} is not a complete safetensors file"


def with_an_index_of_nonsense(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return f"{INDEX} in {folder} is not JSON"


def with_shards_elsewhere(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"../{shard}" for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return f"{INDEX} is not an index of shards"


def without_weights(folder: Path) -> str:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    return f"{folder} holds no weights that are read here: expected model.safetensors"


def of_numbers_that_are_none(folder: Path) -> str:
    shard = min(folder.glob("model-*.safetensors"))
    safetensors.torch.save_file({name: tensor * torch.nan for name, tensor in safetensors.torch.load_file(shard).items()}, shard)
    return "hold NaN or infinity"


def with_a_config_of_nonsense(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json is not a model configuration"


@pytest.mark.parametrize(
    "harm",
    [
        without_a_shard,
        with_a_tensor_too_many,
        with_a_tensor_less,
        with_an_index_that_lacks_a_tensor_of_both,
        cut_off,
        with_an_index_of_nonsense,
        with_shards_elsewhere,
        without_weights,
        of_numbers_that_are_none,
        with_a_config_of_nonsense,
    ],
    ids=lambda harm: harm.__name__,
)
def test_an_incomplete_folder_is_refused_with_what_it_lacks(tmp_path: Path, harm: Callable[[Path], str]):
    saved(tmp_path)
    expected = harm(tmp_path)
    assert expected in refusal(tmp_path)


def test_the_differences_of_config_and_recipe_are_named(tmp_path):
    saved(tmp_path, layout=dataclasses.replace(PLAIN, num_layers=3))
    message = refusal(tmp_path)
    assert "num_layers: expected 2, got 3" in message
    assert "feed_forward_proj: expected gated-gelu, got relu" in message
    assert "d_model" not in message


def test_only_config_json_reveals_an_unsupported_activation(tmp_path):
    saved(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"feed_forward_proj": "gated-silu"}))
    assert "feed_forward_proj: expected gated-gelu, got gated-silu" in refusal(tmp_path)
    config.unlink()
    make_student(GATED, str(tmp_path), 0.1, seed=0)


def test_without_a_config_the_tensors_reveal_the_differences(tmp_path):
    saved(tmp_path, layout=dataclasses.replace(GATED, d_ff=20))
    (tmp_path / "config.json").unlink()
    assert "wi_0.weight: expected [24, 16], got [20, 16]" in refusal(tmp_path)


def test_a_file_of_another_kind_is_called_by_its_name(tmp_path):
    clip = safetensors.torch.save({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)})
    (tmp_path / "clip_l.safetensors").write_bytes(clip)
    assert refusal(tmp_path / "clip_l.safetensors").startswith("clip_l.safetensors is a CLIP text encoder")
    assert "no_such does not exist" in refusal(tmp_path / "no_such")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 100)
    assert "garbage.safetensors is not a complete safetensors file" in refusal(tmp_path / "garbage.safetensors")


def test_a_distilled_file_that_lacks_a_tensor_is_not_mistaken_for_a_plain_t5(tmp_path):
    tensors = DistilledT5(GATED).tensors()
    del tensors["final_projection.0.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    assert "final_projection.0.weight" in refusal(tmp_path / "half.safetensors")


def test_two_token_tables_that_differ_are_refused(tmp_path):
    untied(one_token_table=False).save_pretrained(tmp_path)
    assert "two token tables that differ" in refusal(tmp_path)
