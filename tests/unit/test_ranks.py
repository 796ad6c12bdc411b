"""Several processes are one run: they agree on numbers, one of them writes, and none waits for a dead one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.runtime.ranks import Ranks, RanksError, is_lost_process
from torch.nn import Linear

pytestmark = pytest.mark.full

BOOTSTRAP = f"import runpy; runpy.run_path({str(Path(__file__).resolve().parent.parent / 'conftest.py')!r})\n"
# A hang would show as a timeout of the whole.
BOUND_S = 300

TOGETHER = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
written = []
def watch(event, arguments):
    if event == "open" and arguments[2] & 3 and str(arguments[0]).startswith(str(folder / "run")):
        written.append(str(arguments[0]))
    if event in ("os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder / "run")):
        written.append(str(arguments[0]))

import pickle
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import Linear
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.report import Reporter
from distilled_t5.train.run_directory import RunDirectory

torch.manual_seed(0)
inputs, weight = torch.randn(8, 3), torch.randn(2, 3)
with Ranks.open("cpu", timeout_s=120) as ranks:
    told = {"rank": ranks.rank, "world": ranks.world, "local_rank": ranks.local_rank, "is_main": ranks.is_main}
    value = torch.tensor([1.0, 3.0]) * (ranks.rank + 1)
    told["mean"] = [ranks.mean(value).tolist(), value.tolist()]
    told["gather"] = ranks.gather({"rank": ranks.rank, "state": torch.tensor([ranks.rank])})[1]["state"].item()
    told["share"] = ranks.share({"from": ranks.rank})
    pickled, broadcast = [], dist.broadcast_object_list
    def watched(objects, **where):
        pickled.append(len(pickle.dumps(objects)))
        broadcast(objects, **where)
    dist.broadcast_object_list = watched
    moments = [torch.arange(1e5) * (ranks.rank + 1), torch.tensor(7 + ranks.rank), torch.arange(6, dtype=torch.uint8).reshape(2, 3).t()]
    shared = ranks.share({"step": 3, "moments": {0: tuple(moments)}} if ranks.is_main else None)
    dist.broadcast_object_list = broadcast
    told["pickled"] = pickled
    told["tensors"] = [[str(x.dtype), list(x.shape), x.double().sum().item()] for x in shared["moments"][0]]
    told["order"] = shared["moments"][0][2].tolist()
    told["scatter"] = ranks.scatter([f"for {rank}" for rank in range(2)] if ranks.is_main else None)
    told["any"] = [ranks.any_of(False), ranks.any_of(ranks.rank == 1), ranks.any_of(True)]
    ranks.barrier()

    torch.manual_seed(ranks.rank)
    model = Linear(3, 2, bias=False)
    if ranks.is_main:
        model.weight.data.copy_(weight)
    wrapped = ranks.wrap(model)
    told["weight"] = model.weight.tolist()
    mine = inputs[4 * ranks.rank : 4 * ranks.rank + 4]
    with ranks.no_sync(wrapped):
        (wrapped(mine[:2]).square().mean() / 2).backward()
    told["unsynced"] = model.weight.grad.tolist()
    (wrapped(mine[2:]).square().mean() / 2).backward()
    told["gradient"] = model.weight.grad.tolist()

    sys.addaudithook(watch)
    run = RunDirectory(folder / "run").start("recipe") if ranks.is_main else None
    with Reporter(run, load_recipe("smoke", ["stage.0.steps=1", "stage.1.steps=1", "optimizer.warmup_steps=1"])) as reporter:
        reporter.step(1, 0.5, 8)
        reporter.image("sheet", lambda: Image.new("RGB", (8, 8)))
    told["written"] = written
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
"""

DYING = """
import os, sys
import torch
from torch.nn import Linear
from distilled_t5.runtime.ranks import Ranks, RanksError
from distilled_t5.runtime.stop import StopRequest

def main():
    with StopRequest(), Ranks.open("cpu") as ranks:
        model = ranks.wrap(Linear(3, 2))
        ranks.barrier()
        if ranks.rank == 1:
            os._exit(1)
        try:
            ranks.mean(torch.ones(1))
        except RanksError as error:
            print("MEAN:", error, flush=True)
        try:
            ranks.gather("anyone?")
        except RanksError as error:
            print("GATHER:", error, flush=True)
        model(torch.ones(1, 3)).sum().backward()

try:
    main()
except RanksError as error:
    print("BACKWARD:", error, flush=True)
    sys.exit(7)
"""


def torchrun(tmp_path: Path, code: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(BOOTSTRAP + code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        str(script),
        str(tmp_path),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes under torchrun told, by rank."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(folder, TOGETHER)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_processes_of_torchrun_know_themselves_and_each_other(two):
    assert [{name: told[name] for name in ("rank", "world", "local_rank", "is_main")} for told in two] == [
        {"rank": 0, "world": 2, "local_rank": 0, "is_main": True},
        {"rank": 1, "world": 2, "local_rank": 1, "is_main": False},
    ]


def test_mean_is_the_same_everywhere_and_leaves_its_input_alone(two):
    assert [told["mean"] for told in two] == [[[1.5, 4.5], [1.0, 3.0]], [[1.5, 4.5], [2.0, 6.0]]]


def test_objects_are_gathered_shared_and_flags_agreed_upon(two):
    for told in two:
        assert told["gather"] == 1
        assert told["share"] == {"from": 0}
        assert told["any"] == [False, True, True]


def test_shared_tensors_travel_as_tensors_and_nothing_large_is_pickled(two):
    for told in two:
        assert told["tensors"] == [["torch.float32", [100_000], 4_999_950_000.0], ["torch.int64", [], 7], ["torch.uint8", [3, 2], 15]]
        assert max(told["pickled"]) < 2_000


def test_a_shared_tensor_keeps_the_order_of_its_elements_whatever_its_strides(two):
    assert [told["order"] for told in two] == [[[0, 3], [1, 4], [2, 5]]] * 2


def test_every_process_gets_its_own_part_of_what_is_scattered(two):
    assert [told["scatter"] for told in two] == ["for 0", "for 1"]


def test_wrapped_module_has_the_weights_of_rank_0_and_the_gradient_of_the_global_batch(two):
    torch.manual_seed(0)
    inputs, weight = torch.randn(8, 3), torch.randn(2, 3)
    model = Linear(3, 2, bias=False)
    model.weight.data.copy_(weight)
    model(inputs).square().mean().backward()
    assert model.weight.grad is not None
    for told in two:
        assert told["weight"] == weight.tolist()
        torch.testing.assert_close(torch.tensor(told["gradient"]), model.weight.grad)
    assert two[0]["gradient"] == two[1]["gradient"]


def test_while_gradients_are_accumulated_each_process_has_its_own(two):
    assert two[0]["unsynced"] != two[1]["unsynced"]


def test_only_rank_0_writes_to_the_run(two):
    assert any(path.endswith("metrics.jsonl") for path in two[0]["written"])
    assert two[1]["written"] == []


AGAIN = """
import json, sys
from pathlib import Path
import torch
from torch.nn import Linear, Sequential
from distilled_t5.runtime.ranks import Ranks

with Ranks.open("cpu", timeout_s=120) as ranks:
    torch.manual_seed(0)
    model = ranks.wrap(Sequential(*(Linear(600, 600) for _ in range(6))))
    torch.manual_seed(10 + ranks.rank)
    x, chance = torch.randn(5, 600), torch.get_rng_state()
    ranks.warm_up(model, x)
    assert torch.equal(torch.get_rng_state(), chance) and all(p.grad is None for p in model.parameters())
    seen = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        seen.append([p.grad.clone() for p in model.parameters()])
    same = [all(torch.equal(a, b) for a, b in zip(seen[0], later)) for later in seen[1:]]
    Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(same))
"""


def test_the_first_step_of_a_process_sums_gradients_as_later_ones_do(tmp_path):
    """Else three processes that are resumed add in another order than those that went on, and end in other bits."""
    done = torchrun(tmp_path, AGAIN, processes=3)
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)] == [[True, True]] * 3


def test_a_dying_process_ends_the_others_with_a_message(tmp_path):
    done = torchrun(tmp_path, DYING)
    assert done.returncode != 0
    for call in ("MEAN", "GATHER", "BACKWARD"):
        assert f"{call}: Rank 0 of 2 stops because another process of the run died or does not respond" in done.stdout
    assert done.stdout.count("What to do: correct the cause in that process's own message") == 3
    assert "Traceback" not in done.stdout


def test_one_process_alone_is_a_run_of_one_and_touches_nothing_distributed():
    with Ranks.open() as ranks:
        assert ranks == Ranks(rank=0, world=1, local_rank=0)
        assert ranks.is_main
        value, model = torch.tensor(2.0), Linear(2, 2)
        assert ranks.mean(value) == 2
        assert ranks.gather("a") == ["a"]
        assert ranks.share("a") == "a"
        assert ranks.scatter(["a"]) == "a"
        assert [ranks.any_of(True), ranks.any_of(False)] == [True, False]
        assert ranks.wrap(model) is model
        with ranks.no_sync(model):
            ranks.barrier()
        assert not torch.distributed.is_initialized()


def test_errors_that_are_not_about_other_processes_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), Ranks.open():
        raise RuntimeError("shapes do not match")
    assert not is_lost_process(RuntimeError("out of memory"))
    assert not is_lost_process(RanksError("gloo"))
    with pytest.raises(RanksError, match=r"Rank 1 of 4 stops .*: nccl gave up\nWhat to do"), Ranks(rank=1, world=4):
        raise torch.distributed.DistBackendError("nccl gave up\nat some place")
