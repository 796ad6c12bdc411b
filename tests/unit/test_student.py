"""The student that is trained: its names are the file's, and its numbers are transformers'."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import safetensors.torch
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.students.t5.layout import SHARED, StudentLayout
from distilled_t5.students.t5.names import TOKEN_TABLE_TWIN
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.tests.support.tiny_students import TINY, published_file, tensor_digest, tiny_tensors
from torch import Tensor
from transformers import T5Config, T5EncoderModel

LAYOUTS = [
    dataclasses.replace(TINY, gated=gated, hidden_bias=hidden_bias, output_bias=not hidden_bias, projected_width=24)
    for gated, hidden_bias in itertools.product([True, False], [True, False])
]
UNPROJECTED = StudentLayout(d_model=16, d_ff=24, num_layers=2, num_heads=3, d_kv=4, vocab_size=40)
TOKENS_BL = torch.tensor([[5, 17, 39, 2, 1, 0, 0, 0], [3, 1, 0, 0, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


def reference(tensors: dict[str, Tensor], layout: StudentLayout) -> Tensor:
    """The embedding of TOKENS_BL by transformers and two matrix products, from nothing but the tensors of a file."""
    config = T5Config(
        vocab_size=layout.vocab_size,
        d_model=layout.d_model,
        d_kv=layout.d_kv,
        d_ff=layout.d_ff,
        num_layers=layout.num_layers,
        num_heads=layout.num_heads,
        feed_forward_proj="gated-gelu" if layout.gated else "relu",
    )
    encoder = T5EncoderModel(config).eval()
    own = {name.removeprefix("encoder."): tensor.float() for name, tensor in tensors.items() if name.startswith("encoder.")}
    missing, unexpected = encoder.load_state_dict(own, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    assert not unexpected
    with torch.no_grad():
        hidden = encoder(input_ids=TOKENS_BL).last_hidden_state
    if not layout.has_projection:
        return hidden
    none = torch.zeros(1)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    hidden = hidden @ weights["final_projection.0.weight"].T + weights.get("final_projection.0.bias", none)
    return hidden.clamp(min=0) @ weights["final_projection.3.weight"].T + weights.get("final_projection.3.bias", none)


@pytest.mark.parametrize("layout", [*LAYOUTS, TINY, UNPROJECTED, StudentLayout.named("small", 8)], ids=lambda layout: layout.size_name)
def test_state_dict_is_the_published_file_name_for_name(layout):
    with torch.device("meta"):
        student = DistilledT5(layout)
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    shapes.pop(TOKEN_TABLE_TWIN, None)
    assert shapes == layout.tensors()
    assert student.tensors().keys() == layout.tensors().keys()
    assert sum(parameter.numel() for parameter in student.parameters()) == layout.parameters


@pytest.mark.parametrize("layout", [*LAYOUTS, TINY, UNPROJECTED])
def test_published_file_gives_the_numbers_of_plain_transformers(layout, tmp_path):
    metadata = {"distilled_t5.format_version": "1", "distilled_t5.text_width": str(layout.output_width)}
    metadata["distilled_t5.projection"] = "mlp" if layout.has_projection else "none"
    path = published_file(tmp_path / "student.safetensors", tiny_tensors(layout, torch.float32), metadata)
    student = DistilledT5(layout).eval()
    student.load_tensors(open_student(path).load())
    with torch.no_grad():
        found = student(TOKENS_BL)
    assert found.shape == (2, 8, layout.output_width)
    torch.testing.assert_close(found, reference(safetensors.torch.load_file(path), layout), rtol=1e-5, atol=1e-5)


def test_trained_student_is_written_and_read_bit_by_bit(tmp_path):
    student = DistilledT5(TINY)
    student(TOKENS_BL).square().mean().backward()
    torch.optim.AdamW(student.parameters(), lr=1e-3).step()
    path = write_student(tmp_path / "student.safetensors", student.tensors(), StudentMetadata(token_length=8))
    assert tensor_digest(open_student(path).load()) == tensor_digest({name: tensor.detach() for name, tensor in student.tensors().items()})
    other = DistilledT5(TINY)
    other.load_tensors(open_student(path).load())
    assert torch.equal(other.eval()(TOKENS_BL), student.eval()(TOKENS_BL))


def test_token_table_and_its_twin_stay_one_parameter(tmp_path):
    student = DistilledT5(TINY)
    student.load_tensors(tiny_tensors(dtype=torch.float32))
    student(TOKENS_BL).sum().backward()
    table = dict(student.named_parameters())[SHARED]
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
    assert len([name for name, parameter in student.named_parameters(remove_duplicate=False) if parameter is table]) == 2


def test_padding_is_attended_to_as_in_flux():
    student = DistilledT5(TINY).eval()
    student.load_tensors(tiny_tensors(dtype=torch.float32))
    with torch.no_grad():
        padded, bare = student(TOKENS_BL[:1]), student(TOKENS_BL[:1, :5])
    assert not torch.allclose(padded[:, :5], bare)


def test_tensors_that_do_not_fit_are_all_named():
    wrong = tiny_tensors(dtype=torch.float32)
    del wrong["final_projection.0.weight"]
    with pytest.raises(RuntimeError, match=r"(?s)final_projection\.0\.weight.*surplus"):
        DistilledT5(TINY).load_tensors({**wrong, "surplus": torch.zeros(1)})


def test_dropout_works_in_training_only():
    student = DistilledT5(TINY, dropout=0.5)
    assert not torch.equal(student.train()(TOKENS_BL), student(TOKENS_BL))
    assert torch.equal(student.eval()(TOKENS_BL), student(TOKENS_BL))
