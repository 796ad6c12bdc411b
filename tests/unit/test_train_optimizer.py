"""Muon beside AdamW: which weights it moves, that both follow one schedule, and that a resumed pair goes on as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.train.distill import linear_schedule
from distilled_t5.train.optimizer import MuonAndAdamW, make_optimizer, restart, set_rate
from distilled_t5.train.recipe import RANDOM
from distilled_t5.train.student_start import make_student
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

TINY = StudentLayout(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, hidden_width=8, projected_width=24)
BETAS = (0.9, 0.98)


def student() -> Any:
    return make_student(TINY, RANDOM, 0.0, seed=0)


def pair(module: torch.nn.Module) -> MuonAndAdamW:
    optimizer = make_optimizer(module, 1e-2, BETAS, 0.01, muon_learning_rate=5e-3)
    assert isinstance(optimizer, MuonAndAdamW)
    return optimizer


def one_step(module: Any, optimizer: Any, seed: int) -> None:
    token_ids = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(seed))
    module(token_ids).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_without_a_rate_for_muon_it_is_adamw_over_all() -> None:
    module = student()
    optimizer = make_optimizer(module, 1e-2, BETAS, 0.01)
    assert type(optimizer) is AdamW
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


def test_muon_moves_the_matrices_inside_the_blocks_and_adamw_all_else() -> None:
    module = student()
    muon, adamw = pair(module).param_groups
    names = {id(weight): name for name, weight in module.named_parameters()}
    inner, rest = ({names[id(weight)] for weight in group["params"]} for group in (muon, adamw))
    assert inner | rest == set(names.values())
    assert not inner & rest
    assert len(inner) == TINY.num_layers * 7
    assert all(".block." in name and "norm" not in name for name in inner)
    assert {"final_projection.0.weight", "final_projection.3.weight"} <= rest
    assert any("relative_attention_bias" in name for name in rest)
    assert any("shared" in name for name in rest)


def test_both_rise_and_fall_together() -> None:
    optimizer = pair(student())
    set_rate(optimizer, 4e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-3, 4e-3])


def test_a_step_moves_every_weight_and_a_resumed_pair_goes_on_bit_for_bit() -> None:
    whole, parts = student(), student()
    optimizers = [pair(whole), pair(parts)]
    before = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    for module, optimizer in zip((whole, parts), optimizers, strict=True):
        one_step(module, optimizer, 0)
    unmoved = {name for name, weight in whole.named_parameters() if torch.equal(weight, before[name])}
    assert not unmoved
    resumed = student()
    resumed.load_tensors(parts.tensors())
    again = pair(resumed)
    again.load_state_dict(optimizers[1].state_dict())
    one_step(whole, optimizers[0], 1)
    one_step(resumed, again, 1)
    assert all(torch.equal(weight, other) for weight, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len(again.state) == len(list(resumed.parameters()))


def test_a_gradient_that_is_not_finite_moves_nothing_under_a_loss_scaler() -> None:
    module = student()
    optimizer: Any = pair(module)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(module(torch.ones(1, 3, dtype=torch.long)).mean()).backward()
    gradient = next(module.parameters()).grad
    assert gradient is not None
    gradient.fill_(float("inf"))
    before = [weight.detach().clone() for weight in module.parameters()]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(weight, old) for weight, old in zip(module.parameters(), before, strict=True))
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon and AdamW"])
def test_a_restarted_optimizer_moves_as_a_new_one_does(muon: bool) -> None:
    used, new = student(), student()
    optimizers: list[Any] = [pair(module) if muon else make_optimizer(module, 1e-2, BETAS, 0.01) for module in (used, new)]
    one_step(used, optimizers[0], 0)
    assert optimizers[0].state
    restart(optimizers[0])
    assert not optimizers[0].state
    new.load_tensors(used.tensors())
    for module, optimizer in zip((used, new), optimizers, strict=True):
        one_step(module, optimizer, 1)
    assert all(torch.equal(weight, other) for weight, other in zip(used.parameters(), new.parameters(), strict=True))


def test_the_learning_rate_rises_and_falls_once_or_in_every_period() -> None:
    whole, periods = linear_schedule(1.0, 2, 10), linear_schedule(1.0, 2, 4, 6)
    assert [whole(step) for step in (0, 1, 2, 6, 9, 12)] == [0.5, 1.0, 1.0, 0.5, 0.125, 0.0]
    assert [periods(step) for step in range(12)] == [0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
