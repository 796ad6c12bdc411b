"""Sizes read off tensor shapes."""

from __future__ import annotations

import dataclasses
import itertools
from random import Random

import pytest
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import FINAL_NORM, NAMED_SIZES, POSITION_BIAS, SHARED, Shape, StudentLayout, read_layout
from distilled_t5.tests.support.tiny_students import TINY

FIRST = "encoder.encoder.block.0.layer"


def refusal(shapes: dict[str, Shape]) -> str:
    with pytest.raises(StudentFileError) as caught:
        read_layout(shapes, "some.safetensors")
    message = str(caught.value)
    assert message.startswith("some.safetensors")
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


# Published sizes in bf16, arXiv:2503.19897 and field measurements: GB with the projection to 4096.
@pytest.mark.parametrize(("size", "gigabytes"), [("small", 0.108), ("base", 0.259), ("large", 0.724), ("xl", 2.50)])
def test_named_sizes_have_the_published_number_of_parameters(size, gigabytes):
    assert StudentLayout.named(size).parameters * 2 / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_plain_t5xxl_encoder_has_9_5_gigabytes_in_bf16():
    assert StudentLayout.named("xxl", output_width=None).parameters * 2 / 1e9 == pytest.approx(9.5, rel=0.01)


def test_published_tensor_names_of_t5_base():
    shapes = StudentLayout.named("base").tensors()
    assert len(shapes) == 1 + 12 * 9 + 1 + 1 + 2
    assert shapes[SHARED] == (32128, 768)
    assert shapes[f"{FIRST}.0.SelfAttention.q.weight"] == (768, 768)
    assert shapes[POSITION_BIAS] == (32, 12)
    assert shapes["encoder.encoder.block.11.layer.1.DenseReluDense.wi_1.weight"] == (2048, 768)
    assert shapes["encoder.encoder.block.11.layer.1.DenseReluDense.wo.weight"] == (768, 2048)
    assert shapes[FINAL_NORM] == (768,)
    assert shapes["final_projection.0.weight"] == (4096, 768)
    assert shapes["final_projection.3.weight"] == (4096, 4096)
    assert [name for name in shapes if "relative_attention_bias" in name] == [POSITION_BIAS]


@pytest.mark.parametrize("size", NAMED_SIZES)
@pytest.mark.parametrize("output_width", [4096, 768, None])
def test_every_named_size_is_read_back_from_its_shapes(size, output_width):
    layout = StudentLayout.named(size, output_width)
    assert read_layout(layout.tensors(), "file") == layout
    assert layout.has_projection == (output_width is not None)
    assert layout.output_width == (output_width or NAMED_SIZES[size][0])


@pytest.mark.parametrize(("gated", "hidden_bias", "output_bias"), list(itertools.product([True, False], repeat=3)))
def test_gate_and_biases_are_read_off_the_tensors(gated, hidden_bias, output_bias):
    layout = dataclasses.replace(StudentLayout.named("small"), gated=gated, hidden_bias=hidden_bias, output_bias=output_bias)
    shapes = layout.tensors()
    assert read_layout(shapes, "file") == layout
    assert (f"{FIRST}.1.DenseReluDense.wi.weight" in shapes) == (not gated)
    assert ("final_projection.0.bias" in shapes, "final_projection.3.bias" in shapes) == (hidden_bias, output_bias)


def test_layouts_of_any_size_are_read_back():
    rng = Random(0)
    for _ in range(300):
        d_model, d_ff, layers, heads, d_kv, vocabulary, hidden, output = (rng.randint(1, 40) for _ in range(8))
        projection = {
            "hidden_width": hidden,
            "projected_width": output,
            "hidden_bias": rng.random() < 0.5,
            "output_bias": rng.random() < 0.5,
        }
        layout = StudentLayout(
            d_model, d_ff, layers, heads, d_kv, rng.random() < 0.5, vocabulary, **(projection if rng.random() < 0.8 else {})
        )
        shapes = list(layout.tensors().items())
        rng.shuffle(shapes)
        assert read_layout(dict(shapes), "file") == layout


def test_attention_width_need_not_be_the_model_width():
    small = StudentLayout.named("small")
    assert small.num_heads * small.d_kv == 384 != small.d_model
    assert small.tensors()[f"{FIRST}.0.SelfAttention.o.weight"] == (512, 384)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(
            (StudentLayout.named(size), name)
            for size, name in zip(NAMED_SIZES, ("T5-Small", "T5-Base", "T5-Large", "T5-XL", "T5-XXL"), strict=True)
        ),
        (TINY, "T5 of width 8, 2 layers"),
        (dataclasses.replace(StudentLayout.named("base"), gated=False), "T5 of width 768, 12 layers"),
    ],
)
def test_size_has_a_name_for_people(layout, name):
    assert layout.size_name == name


def test_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*small, base, large, xl, xxl"):
        StudentLayout.named("huge")


def test_all_missing_extra_and_wrong_tensors_are_listed():
    layout = StudentLayout.named("large")
    shapes = layout.tensors()
    missing = [name for name in shapes if ".block.7." in name or name.endswith("layer_norm.weight")]
    wrong = [name for name in shapes if name.endswith("wo.weight") and name not in missing]
    extra = [f"lm_head.{number}.weight" for number in range(300)]
    broken = {name: (3, 3) if name in wrong else shape for name, shape in shapes.items() if name not in missing}
    message = refusal(broken | dict.fromkeys(extra, (4,)))
    # The blocks end at the gap, so later blocks are extra tensors.
    for name in [*extra, *(f"encoder.encoder.block.{block}.layer.0.SelfAttention.q.weight" for block in range(8, 24))]:
        assert f"  {name}\n" in message
    for name in [name for name in missing if ".block.7." not in name and int((name + ".block.0.").split("block.")[1].split(".")[0]) < 7]:
        assert f"  {name}\n" in message
    assert f"  {FIRST}.1.DenseReluDense.wo.weight: expected [1024, 2816], got [3, 3]\n" in message


@pytest.mark.parametrize("name", TINY.tensors())
def test_each_single_missing_tensor_is_named(name):
    message = refusal({other: shape for other, shape in TINY.tensors().items() if other != name})
    assert name in message.replace("projection.0 and .3", name)


@pytest.mark.parametrize("name", TINY.tensors())
def test_each_single_wrong_shape_is_refused(name):
    shapes = TINY.tensors()
    for wrong in [(*shapes[name], 2), (), (0, 8)]:
        assert str(list(wrong)) in refusal(shapes | {name: wrong})
    # Another width of the token table or another number of heads puts everything else in the wrong.
    one_more = (*shapes[name][:-1], shapes[name][-1] + 1)
    message = refusal(shapes | {name: (32, 5) if name == POSITION_BIAS else one_more})
    assert str(list(one_more)) in message or name in (SHARED, POSITION_BIAS)


def test_all_missing_tensors_that_identify_a_t5_are_named_at_once():
    telling = [SHARED, POSITION_BIAS, f"{FIRST}.0.SelfAttention.q.weight", f"{FIRST}.1.DenseReluDense.wi_0.weight"]
    message = refusal({name: shape for name, shape in TINY.tensors().items() if name not in telling})
    for name in telling:
        assert name in message


def test_heads_that_do_not_divide_the_attention_width_are_refused():
    shapes = TINY.tensors() | {POSITION_BIAS: (32, 5)}
    message = refusal(shapes)
    assert "5 attention heads" in message
    assert "12" in message


def test_forged_block_numbers_cost_nothing():
    forged = "encoder.encoder.block.99999999999999.layer.0.SelfAttention.q.weight"
    assert f"  {forged}" in refusal(TINY.tensors() | {forged: (12, 8)})


def test_names_of_any_length_and_any_letters_stay_readable():
    message = refusal(TINY.tensors() | {"x" * 100_000: (1,), "line\nbreak\x00\u202e": (1,)})
    assert len(message) < 5_000
    assert "xxx" in message
    assert "line\nbreak" not in message
    assert "\x00" not in message


def test_no_tensors_at_all():
    assert "no tensors" in refusal({})
