"""Values and random states that a checkpoint holds: brought back exactly, or refused by name."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from distilled_t5.runtime.packing import pack, unpack
from distilled_t5.runtime.randomness import random_states, restore_random_states, undisturbed
from distilled_t5.tests.support.exact import same
from torch import Tensor


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        -0.0,
        5e-324,
        math.pi * 1e300,
        math.nan,
        math.inf,
        -math.inf,
        True,
        1,
        2**70,
        None,
        "é\n",
        [],
        (),
        {},
        (1, [2.0, (None,)], {"a": {0: "b", 1: (True,)}}),
        {"tensor": "a string", "float": "nan"},
        {0: torch.ones(1), "0": torch.zeros(1)},
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.tensor([float("nan"), -0.0, 1e-45]),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.tensor([2**62], dtype=torch.int64),
        torch.arange(4).to(torch.float8_e4m3fn),
        torch.arange(12.0)[::3],
    ],
    ids=str,
)
def test_values_and_tensors_round_trip_through_json_and_safetensors(tmp_path, value):
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(value, tensors, "value"), allow_nan=False)
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors")
    assert same(unpack(json.loads(text), safetensors.torch.load_file(tmp_path / "t.safetensors")), value)


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), torch.float32, {"a": [b"bytes"]}, {(1, 2): 3}, {1.5: 2}], ids=lambda one: type(one).__name__
)
def test_what_could_not_be_brought_back_is_refused_by_its_name(value):
    with pytest.raises(TypeError, match=r"optimizer"):
        pack(value, {}, "optimizer")


def test_random_states_of_other_generators_are_refused():
    with pytest.raises(ValueError, match=r"\[\].*noise"):
        restore_random_states(random_states({"noise": torch.Generator()}), {})


def test_random_states_of_a_gpu_that_is_not_here_are_named_and_the_others_restored():
    states = random_states({}) | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 99, "mps": []}
    expected = torch.rand(3)
    [note] = restore_random_states(states, {})
    assert "99 CUDA devices" in note
    assert torch.equal(torch.rand(3), expected)


def test_what_is_drawn_aside_changes_no_generator_even_if_it_fails():
    before = random_states({})
    drawn: list[dict[str, object]] = []

    @undisturbed()
    def draw_and_fail() -> None:
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002 (the global generator is what is meant)
        drawn.append(random_states({}))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert not any(same(drawn[0][name], before[name]) for name in ("python", "numpy", "torch"))
    assert same(random_states({}), before)
