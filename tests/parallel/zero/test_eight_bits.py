"""AdamW with 8-bit moments: what a checkpoint holds of them, and a run that resumes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero import eight_bits
from sharpmoe.parallel.zero.optimizers import optimizer_factory
from sharpmoe.planning.layout import rank_parameters
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.train.setting import identical, make_run, plan_for

pytest.importorskip("bitsandbytes")

EIGHT = {"name": "adamw", "impl": "bitsandbytes", "lr": 1e-2}
MANY = 10_000  # not a multiple of a block


def _stepped(count: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(count))
    optimizer = optimizer_factory(OptimConfig(**EIGHT), torch.device("cpu"))([parameter])
    for _ in range(4):
        parameter.grad = torch.randn(count) * torch.rand(count)
        optimizer.step()
    return optimizer.state[parameter]


def test_states_come_back_bit_for_bit() -> None:
    state = _stepped(MANY)
    assert state["state1"].dtype == torch.uint8
    found, kept = eight_bits.unpack(state), {}
    assert found.keys() == {"exp_avg", "exp_avg_sq", "exp_avg_block", "exp_avg_sq_block"}
    assert float(found["exp_avg"].abs().max()) > 0.1
    for key in ("state1", "state2", "absmax1", "absmax2"):
        kept[key] = state[key].clone()
        state[key].zero_()
    eight_bits.pack(state, found)
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_another_layout_rounds_to_its_own_blocks() -> None:
    found, other = eight_bits.unpack(_stepped(MANY)), _stepped(MANY - 100)
    moved = {kind: value[100:] for kind, value in found.items()}
    eight_bits.pack(other, moved)
    again = eight_bits.unpack(other)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert float((again[kind] - moved[kind]).abs().max()) < 0.02 * float(moved[kind].abs().max())
        assert not torch.equal(again[kind], moved[kind])


def test_few_elements_are_kept_in_float32_and_others_have_no_such_states() -> None:
    state = _stepped(100)
    found = eight_bits.unpack(state)
    assert torch.equal(found["exp_avg"], state["state1"])
    assert eight_bits.unpack({"exp_avg": torch.ones(3)}) == {}


def test_the_planner_knows_two_bytes() -> None:
    run = RunConfig.model_validate({"optim": EIGHT})
    assert {part.state_bytes for part in rank_parameters(run, 1, 1)} == {2}
    assert {part.state_bytes for part in rank_parameters(RunConfig(), 1, 1)} == {8}


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="optim.impl: bitsandbytes is not installed; pip install --no-deps"):
        optimizer_factory(OptimConfig(**EIGHT), torch.device("cpu"))


def _train(world: World, run: RunConfig, stage: int) -> None:
    loop.train(plan_for(run, world, stage), world)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage"), [(2, 2), *(pytest.param(*each, marks=pytest.mark.sweep) for each in ((1, 2), (2, 3)))]
)
def test_a_resumed_run_goes_on_bit_for_bit(ranks: int, stage: int, shards: Path, tmp_path: Path) -> None:
    def named(name: str, steps: int) -> RunConfig:
        run = make_run(
            shards,
            tmp_path,
            "ec",
            model={"depth": 2},
            optim=EIGHT,
            train={"steps": steps},
            checkpoint={"resume": "auto"},
        )
        return run.model_copy(update={"name": name})

    run_ranks(_train, ranks, named("whole", 3), stage)
    run_ranks(_train, ranks, named("halves", 2), stage)
    run_ranks(_train, ranks, named("halves", 3), stage)
    one, other = (_files(tmp_path / name / "checkpoints" / "step00000003") for name in ("whole", "halves"))
    assert any(float(value.max()) > 0 for key, value in one.items() if key.startswith("exp_avg_block/"))
    assert identical(one, other)


def _files(folder: Path) -> dict[str, Tensor]:
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return {f"{key}@{name}": value for name, file in files.items() for key, value in file.items()}
