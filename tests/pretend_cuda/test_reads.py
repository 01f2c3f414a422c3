"""How often an optimizer step waits for the device: as often for one rollout step and block as for many.

On pretended CUDA tensors: all of `train_step` but DeepSpeed's own backward and update, whose reads are counted on the
CPU, where they are made by the same lines.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharpmoe.families import FAMILIES
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.objective import Objective, StepRequest
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.parallel.reference import items_of
from tests.pretend_cuda.conftest import Outcomes
from tests.train.setting import make_run, plan_for, stirred_model

Pretended = Callable[[str], Outcomes]
LOSSES, THRESHOLDS = "tolist sharpmoe/train/step.py:train_step", "item sharpmoe/train/step.py:_threshold_fault"
UNCONDITIONAL = "item sharpmoe/moe/dispatch.py:_count_rows"  # images without class, per MoE layer and rollout step
OF_THE_UPDATE = 2  # DeepSpeed's check of the gradient's norm, and the norm


def expected(router: str) -> dict[str, int]:
    reads = {LOSSES: 1}
    if FAMILIES[router].thresholds is not None:
        reads[THRESHOLDS] = 1
    if router == "promoe_ec":
        reads[UNCONDITIONAL] = 1
    return reads


@pytest.mark.slow
def test_a_step_reads_its_losses_and_its_thresholds(pretended: Pretended) -> None:
    for case, found in pretended("steps").items():
        router = case.split(",")[0]
        assert "error" not in found, found
        assert found["reads"] == expected(router), case
        assert sum(found["reads"].values()) + OF_THE_UPDATE <= 4, case


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def update(world: World, shards: Any, output: Any) -> tuple[int, int]:
    """Reads of a step's backward and of its update under ZeRO-3."""
    run = make_run(shards, output, train={"precision": "bf16"})
    plan = plan_for(run, world)
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    (items,) = items_of(plan, world, 1)
    loss = engine(StepRequest(tuple(items))).loss
    with _Reads() as backward:
        engine.backward(loss)
    with _Reads() as step:
        engine.step(0.01, lambda norm: True)
    return backward.count.total(), step.count.total()


@pytest.mark.dist
def test_the_backward_reads_nothing_and_the_update_the_norm(tmp_path: Any) -> None:
    shards = make_shards(tmp_path / "shapes")
    torch.manual_seed(0)
    assert run_ranks(update, 1, shards, tmp_path / "run") == [(0, OF_THE_UPDATE)]
