"""Every router family post-trains: identity at step 0, three steps, and what moves once per step moves."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.read.shards import ShardSet
from data_pipeline.schema import Batch
from sharpmoe.config import RunConfig
from sharpmoe.devices import deterministic_algorithms
from sharpmoe.families import FAMILIES as RECORDS
from sharpmoe.model.attach import attach
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.embed import sincos_positions
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.moe.thresholds import update_biases, update_routers, update_thresholds
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.rollout import TrajectoryBatch, first_x0_prev, rollout_step
from sharpmoe.train.loop import train
from sharpmoe.train.metrics import routing_scalars
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.tally import StepRecord
from sharpmoe.train.trajectories import draw_trajectories
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, ToySamples
from tests.train.setting import identical, make_run, plan_for

FAMILIES = {
    "dense": {"saliency_router": False},
    "tc": {},
    "tc, balanced by a bias": {"top_k": 2, "bias_balancing": True},
    "ec": {},
    "diffmoe": {},
    "promoe_tc": {"num_experts": 3},
    "promoe_ec": {"num_experts": 4},
    "dsmoe": {"num_experts": 8, "num_groups": 4, "top_groups": 2},
    "dit_moe": {},
    "race": {},
    "nucleus": {"text_width": 384, "dense_first": 1, "capacity": 1.3, "num_kv_heads": 1},
}


SLICE = Path(__file__).parents[1] / "data" / "fluent_slice"  # forty images of the quickstart data, prepared


@pytest.fixture(scope="module")
def shards() -> ShardSet:
    return ShardSet.open(SLICE, "train")


def read(shards: ShardSet, run: RunConfig, first: int) -> Batch:
    batch = shards.batch(range(first, first + 8))
    if run.model.conditioning == "text":
        return batch
    return batch._replace(label=torch.arange(8) % run.model.num_classes)  # the images have captions, not classes


def run_of(name: str, shards: Path, schedule: str) -> RunConfig:
    sizes = {"width": 24, "depth": 4, "num_heads": 2, "latent_channels": 16, "latent_size": 16, "num_experts": 4}
    router = name.split(",", maxsplit=1)[0]
    conditioning = "class" if router.startswith("promoe") else "text"  # ProMoE has an expert for images without class
    model = sizes | {"num_classes": 4, "conditioning": conditioning, "router": router} | FAMILIES[name]
    return RunConfig.model_validate(
        {
            "model": model,
            "data": {"shards": str(shards)},
            "rollout": {"num_steps": 3, "schedule": schedule, "caption_dropout": 0.3},
            "loss": {"routing_weight": 0.1 if RECORDS[router].varies_compute else 0.0},
            "optim": {"lr": 1e-3, "bias_rate": 0.01},
            "train": {"steps": 3, "global_batch": 8},
            "checkpoint": {"init": "base.safetensors"},
        }
    )


def base(run: RunConfig) -> Backbone:
    torch.manual_seed(0)
    model = build_model(run.model.model_copy(update={"saliency_router": False}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def gradients(run: RunConfig, model: Backbone, shards: ShardSet, step: int) -> StepRecord:
    objective = Objective(model, run)
    (item,) = draw_trajectories([read(shards, run, 8 * step)], shards.empty_text(), run, torch.device("cpu"))
    answer = objective(StepRequest((item,), with_routing=True))
    answer.loss.backward()
    return answer.records[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_post_trains(name: str, shards: ShardSet) -> None:
    run = run_of(name, shards.location, "plain")
    model = base(run)
    (item,) = draw_trajectories([read(shards, run, 0)], shards.empty_text(), run, torch.device("cpu"))
    before = rollout_step(model, item, 0, None)
    if run.model.saliency_router:
        attach(model)
    assert torch.equal(before.x0_hat, rollout_step(model, item, 0, first_x0_prev(item, uses_x0_prev=True)).x0_hat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optim.lr)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(3):
        record = gradients(run, model, shards, step)
        assert all(term.isfinite() for term in record.terms)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        layers = model.moe_layers()
        if record.thresholds is not None:
            update_thresholds([layer.expert_threshold for layer in layers], record.thresholds, 0.5)
        if record.loads is not None:
            update_biases([layer.expert_bias for layer in layers], record.loads, run.optim.bias_rate)
        named = routing_scalars(record.routing) if record.routing is not None else {}
        assert all(torch.tensor(value).isfinite() for value in named.values())
        assert step > 0 or all(value == 0 for key, value in named.items() if "flipped" in key)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(start[key], value)}
    assert (record.thresholds is not None) == (run.model.family.thresholds is not None)
    for part in ("saliency_router.out", "expert_threshold", "expert_bias", "gate.", "shared."):
        assert any(part in key for key in moved) == any(part in key for key in start), part


# What torch refuses on CUDA under use_deterministic_algorithms (its documentation), of all that a network may call; on
# the host it refuses less. cumsum is refused for floating point only.
REFUSED = re.compile(
    "(avg_pool|adaptive_|fractional_|max_unpool|upsample_.*backward|reflection_pad|nll_loss|ctc_loss|put_?$|histc|"
    "bincount|median|grid_sampler|cumsum|logcumsumexp|scatter_reduce|resize_|embedding_bag)"
)


class Operations(TorchDispatchMode):
    """Notes which operations torch runs, in forward, backward and update."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        floating = args and torch.is_tensor(args[0]) and args[0].is_floating_point()
        self.count += 1
        if REFUSED.match(name) and (floating or "cumsum" not in name):
            self.refused.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_in_deterministic_mode(name: str, shards: ShardSet) -> None:
    """Two steps: torch refuses nothing on the host, and nothing is called that it would refuse on CUDA."""
    run, found = run_of(name, shards.location, "two_pass"), list[dict[str, Tensor]]()
    for _ in range(2):
        model, operations = base(run), Operations()
        model = attach(model) if run.model.saliency_router else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.optim.lr)
        with deterministic_algorithms(strict=True), operations:
            for step in range(2):
                record = gradients(run, model, shards, step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                update_routers(model.moe_layers(), record.thresholds, record.loads, run.optim)
        assert operations.refused == set()
        assert operations.count > 1000
        found.append(model.state_dict())
    assert identical(*found)


def test_refused_operations_are_recognised() -> None:
    with Operations() as operations:
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.long).cumsum(0)
        torch.ones(3).put_(torch.tensor([0]), torch.ones(1))
    assert operations.refused == {"cumsum", "put_"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dense"])
def test_two_passes_give_the_gradient_of_one(name: str, shards: ShardSet) -> None:
    found = []
    for schedule in ("plain", "two_pass"):
        run = run_of(name, shards.location, schedule)
        model = attach(base(run)).double()
        torch.manual_seed(1)
        for layer in model.moe_layers():
            torch.nn.init.normal_(layer.saliency_router.out.weight, std=0.1)
        batch = read(shards, run, 0)
        (run_item,) = draw_trajectories(
            [batch._replace(latent=batch.latent.double())], shards.empty_text(), run, torch.device("cpu")
        )
        objective = Objective(model, run)
        objective(StepRequest((run_item,))).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], rtol=1e-9, atol=1e-11)


SIZES = ((8, 8), (4, 14), (10, 12))  # of latents: 16, 14 and 30 tokens


def mixed_run(name: str, schedule: str, latent_size: int = 8) -> RunConfig:
    run = run_of(name, Path("shards"), schedule)
    sizes = {
        "latent_channels": 4,
        "latent_size": latent_size,
        "depth": 2,
        "text_width": TEXT_WIDTH,
        "pooled_width": POOLED_WIDTH,
    }
    return run.model_copy(update={"model": run.model.model_copy(update=sizes)})


def mixed_items(run: RunConfig, sizes: Sequence[tuple[int, ...]]) -> tuple[TrajectoryBatch, ...]:
    """One micro-batch of four images per size."""
    empty = (torch.zeros(TEXT_LENGTH, TEXT_WIDTH), torch.ones(TEXT_LENGTH, dtype=torch.bool), torch.zeros(POOLED_WIDTH))
    samples, items = ToySamples(4 * len(sizes), sizes), []
    for first in range(0, samples.num_samples, 4):
        batch = samples.batch(range(first, first + 4))
        batch = batch._replace(latent=batch.latent.double(), label=torch.arange(4) % run.model.num_classes)
        items += draw_trajectories([batch], empty, run, torch.device("cpu"))
    return tuple(items)


def mixed_model(run: RunConfig) -> Backbone:
    """In float64, with a saliency router that has been trained."""
    model = base(run)
    model = (attach(model) if run.model.saliency_router else model).double()
    torch.manual_seed(1)
    for layer in model.moe_layers():
        torch.nn.init.normal_(layer.saliency_router.out.weight, std=0.1)
    return model


def gradients_of(run: RunConfig, model: Backbone, items: Sequence[TrajectoryBatch]) -> dict[str, Tensor]:
    Objective(model, run).train()(StepRequest(tuple(items))).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("schedule", ["plain", "two_pass"])
@pytest.mark.parametrize("name", FAMILIES)
def test_resolutions_of_unequal_token_counts_train_as_each_does_alone(name: str, schedule: str) -> None:
    assert_train_as_each_alone(name, schedule, SIZES)


def assert_train_as_each_alone(name: str, schedule: str, sizes: Sequence[tuple[int, ...]]) -> None:
    """The gradient of a step on all of them is the mean of those of plain steps on one, by models that saw no other."""
    run, plain = (mixed_run(name, how) for how in (schedule, "plain"))
    items = mixed_items(run, sizes)
    together = gradients_of(run, mixed_model(run), items)
    alone = [gradients_of(plain, mixed_model(plain), [item]) for item in items]
    for key, gradient in together.items():
        mean = sum(found[key] for found in alone if key in found) / len(items)
        torch.testing.assert_close(gradient, mean, rtol=1e-9, atol=1e-11)


FRAMES = ((2, 8, 8), (3, 4, 8), (10, 12))  # 32, 24 and 30 tokens; the last is of still images
OF_FRAMES = [name for name in FAMILIES if mixed_run(name, "plain").model.takes_frames]


def test_the_families_with_a_part_for_time_are_those_of_sincos_positions() -> None:
    assert {*FAMILIES} - {*OF_FRAMES} == {"dsmoe", "nucleus"}


@pytest.mark.parametrize("schedule", ["plain", "checkpoint", "two_pass"])
@pytest.mark.parametrize("name", ["tc", "ec", "diffmoe", "promoe_ec", "race"])
def test_clips_train_as_each_does_alone_under_every_schedule(name: str, schedule: str) -> None:
    assert_train_as_each_alone(name, schedule, FRAMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_positions_depend_on_the_configured_size(name: str) -> None:
    """A model of another square, given the same positions, trains on the same latents in the same way."""
    small, large = mixed_run(name, "plain"), mixed_run(name, "plain", latent_size=12)
    (item,) = mixed_items(small, ((12, 12),))
    model, other = mixed_model(small), build_model(large.model).double()
    state = model.state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = sincos_positions(large.model.width, (6, 6), 4).double()
    other.load_state_dict(state)
    ours, reference = gradients_of(small, model, [item]), gradients_of(large, other, [item])
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], gradient) for key, gradient in reference.items())


def train_all(world: World, runs: list[RunConfig]) -> list[str]:
    return [str(train(plan_for(run, world), world)) for run in runs]


@pytest.mark.dist
def test_families_run_through_the_engine(tmp_path: Path) -> None:
    """Three post-training steps on two ranks from a bare base, as a user runs them; what moves once is saved."""
    bases, runs = [], []
    drawn = make_shards(tmp_path / "shards")
    for router in ("dsmoe", "promoe_ec", "race"):
        model = {"router": router, "conditioning": "class", "num_classes": 4}
        run = make_run(
            drawn, tmp_path, router, name=router, stage="posttrain", model=model, train={"steps": 3},
            loss={"routing_weight": 0.1 if RECORDS[router].varies_compute else 0.0},
            checkpoint={"init": str(tmp_path / f"{router}.safetensors")},
        )  # fmt: skip
        bare = base(run)
        save_weights(str(run.checkpoint.init), bare.state_dict(), bare.config)
        bases.append(bare.state_dict())
        runs.append(run)
    folders = run_ranks(train_all, 2, runs)[0]
    for before, folder in zip(bases, folders, strict=True):
        trained, _ = load_model(Path(folder) / "live.safetensors")
        state = trained.state_dict()
        moved = {key for key, value in before.items() if not torch.equal(value, state[key])}
        for part in ("expert_bias", "expert_threshold", "gate."):
            assert any(part in key for key in moved) == any(part in key for key in state), part
        assert all(layer.saliency_router.out.weight.abs().sum() > 0 for layer in trained.moe_layers())
