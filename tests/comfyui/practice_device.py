"""The practice accelerator itself. `test_practice_accelerator.py` runs these in a process of their own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from distilled_t5.runtime.randomness import random_states, undisturbed
from distilled_t5.tests.support import practice_accelerator as practice
from distilled_t5.tests.support.exact import same
from torch import nn

DEVICE = torch.device("npu:0")


@pytest.fixture(autouse=True)
def any_budget() -> Iterator[None]:
    yield
    practice.set_budget(None)


def test_torch_and_comfyui_take_it_for_the_accelerator():
    import comfy.model_management

    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert comfy.model_management.get_torch_device() == DEVICE


def test_tensors_of_two_devices_do_not_mix():
    ours = torch.ones(3, device=DEVICE)
    for mixed in (lambda: ours + torch.ones(3), lambda: torch.ones(3).add_(ours), lambda: torch.zeros(()).add_(ours.sum())):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert torch.equal((ours + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))  # a single number is allowed, as on a GPU


def test_memory_is_counted_until_the_last_tensor_of_an_allocation_goes_and_never_exceeds_the_budget():
    gc.collect()
    before = practice.memory.allocated
    practice.reset_peak()
    whole = torch.zeros(1000, device=DEVICE)
    part = whole[:10]
    del whole
    assert practice.memory.allocated - before == 4000
    del part
    assert practice.memory.allocated == before
    assert practice.memory.peak - before == 4000
    practice.set_budget(before + 3999)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.zeros(1000, device=DEVICE)
    torch.zeros(999, device=DEVICE)


def test_a_network_trains_as_on_the_cpu_to_the_bit():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5))
    ours, x = copy.deepcopy(theirs).to(DEVICE), torch.randn(4, 5)
    for model, inputs in ((ours, x.to(DEVICE)), (theirs, x)):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(3):
            model(inputs).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(one.cpu(), other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_modules_that_share_a_weight_still_do_on_the_device():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    both = nn.Sequential(first, second).to(DEVICE)
    assert both[0].weight is both[1].weight
    assert both[0].weight.device == DEVICE


def test_attention_and_autocast_give_the_numbers_of_the_cpu():
    query = torch.randn(2, 4, 16, 8)
    mask = torch.rand(16, 16) > 0.3
    for given in (None, mask):
        ours = nn.functional.scaled_dot_product_attention(*(query.to(DEVICE),) * 3, attn_mask=given if given is None else given.to(DEVICE))
        assert torch.equal(ours.cpu(), nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=given))
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert torch.equal(layer.to(DEVICE)(x.to(DEVICE)).cpu(), expected)


def test_its_random_numbers_are_its_own_and_are_restored():
    before = random_states({})
    with undisturbed():
        torch.rand(3, device=DEVICE)
        now = random_states({})
        assert same(now["torch"], before["torch"])
        assert not same(now["npu"], before["npu"])
    assert same(random_states({}), before)
