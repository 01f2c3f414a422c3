"""What is run on the pretended device: training under every schedule, sampling, single blocks, and whole steps.

A case is one piece of work; its outcome is what `Watch` recorded of it. Only the child process imports this module
(`__main__`): it needs the guard.
"""

import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sharpmoe import sampling
from sharpmoe.config import ModelConfig, RunConfig, SampleConfig
from sharpmoe.families import FAMILIES
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.moe import router as routers
from sharpmoe.moe.routing import Routing
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.step import train_step
from tests.pretend_cuda.watch import Watch, on_device, pretended_device

IMAGES, TEXT = 4, 20  # images of a call; tokens of a caption
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {},
    "two_pass": {},
    "hybrid": {"kept_steps": 1},
    "segments": {"segment_steps": 1},
}
Outcome = dict[str, Any]


def model_config(router: str, conditioning: str | None = None, **fields: Any) -> ModelConfig:
    """A dense block and an MoE layer, or two MoE layers where the family has no dense blocks."""
    sizes = {"width": 64, "depth": 2, "num_heads": 4, "latent_size": 8, "num_experts": 8, "text_width": 16}
    if router == "nucleus":
        sizes |= {"dense_first": 1}
    kind = conditioning or _conditionings(router)[0]
    return ModelConfig(router=router, conditioning=kind, pooled_width=16, **(sizes | fields))


def run_config(model: ModelConfig, schedule: str = "plain", steps: int = 2) -> RunConfig:
    rollout = {"num_steps": steps, "schedule": schedule} | SCHEDULES[schedule]
    data = {"model": model.model_dump(), "rollout": rollout, "data": {"shards": "none"}}
    return RunConfig.model_validate(data)


def rows_of(model: ModelConfig, images: int = IMAGES) -> int:
    """Rows of all experts of a layer together, where the device is asked for them."""
    return images * model.num_tokens * (model.top_k if model.family.competition == "token" else 1)


def condition(model: ModelConfig, images: int = IMAGES) -> Condition:
    if model.conditioning == "class":
        return ClassCondition(torch.empty(images, dtype=torch.long, device="cuda"))
    tokens = torch.empty(images, TEXT, model.text_width, device="cuda")
    mask = torch.empty(images, TEXT, dtype=torch.bool, device="cuda")
    return TextCondition(tokens, mask, torch.empty(images, model.pooled_width, device="cuda"))


def trajectories(model: ModelConfig, steps: int = 2, images: int = IMAGES) -> TrajectoryBatch:
    latent = torch.empty(images, model.latent_channels, model.latent_size, model.latent_size, device="cuda")
    times, maps = torch.empty(steps, images, device="cuda"), torch.empty(images, model.num_tokens, device="cuda")
    return TrajectoryBatch(latent, torch.empty_like(latent), times, condition(model, images), maps)


def observed(rows: int, build: Callable[[], Callable[[], object]]) -> Outcome:
    """Build on the pretended device, then run what was built and return what it cost, or the error that it raised."""
    try:
        with pretended_device(rows) as watch:
            work = build()
            with watch:
                work()
    except Exception:  # noqa: BLE001 (whatever it is, it is the outcome)
        return {"error": traceback.format_exc()}
    return outcome(watch)


def outcome(watch: Watch) -> Outcome:
    parts = {name: dict(getattr(watch, name)) for name in ("reads", "copies", "mixed", "kernels")}
    return parts | {"launches": watch.kernels.total()}


def on_meta(build: Callable[[], Any]) -> Any:
    """Build without storage. FakeTensorMode does not know the meta device inside its context."""
    with torch.device("meta"):
        return build()


def training(
    model: ModelConfig, dtype: str, schedule: str = "plain", steps: int = 2, with_routing: bool = False
) -> Outcome:
    network, run = on_meta(lambda: build_model(model)), run_config(model, schedule, steps)

    def build() -> Callable[[], object]:
        objective = Objective(on_device(network, DTYPES[dtype]).train(), run)
        request = StepRequest((trajectories(model, steps),), 0, with_routing)
        return lambda: objective(request).loss.backward()

    return observed(rows_of(model), build)


def drawing(model: ModelConfig, dtype: str, method: str = "euler", steps: int = 2) -> Outcome:
    network, settings = on_meta(lambda: build_model(model)), SampleConfig(num_steps=steps, cfg_scale=2, method=method)

    def build() -> Callable[[], object]:
        moved, cond = on_device(network, DTYPES[dtype]).eval(), condition(model, IMAGES // 2)
        text = (torch.zeros(2, model.text_width), torch.ones(2, dtype=torch.bool), torch.zeros(model.pooled_width))
        empty = sampling.empty_condition(cond, model, None if model.conditioning == "class" else text)
        request = sampling.Request(cond, empty, tuple(range(IMAGES // 2)))
        return lambda: sampling.generate(moved, model, settings, request)

    return observed(rows_of(model), build)


def whole_step(model: ModelConfig, schedule: str, steps: int, with_routing: bool = False) -> Outcome:
    """An optimizer step in bf16, all but what DeepSpeed does: its backward and update read as `test_reads` counts."""
    network, run = on_meta(lambda: build_model(model)), run_config(model, schedule, steps)

    def build() -> Callable[[], object]:
        objective, world = (
            Objective(on_device(network, torch.bfloat16).train(), run),
            World(0, 1, 0, torch.device("cuda")),
        )
        engine = _Undriven(objective, world)
        average: Any = SimpleNamespace(update=lambda: None)
        items = [trajectories(model, steps)]
        return lambda: train_step(engine, objective, average, items, 0, with_routing)  # type: ignore[arg-type]

    return observed(rows_of(model), build)


class _Undriven:
    """The engine as `train_step` uses it, without DeepSpeed."""

    def __init__(self, objective: nn.Module, world: World) -> None:
        self._objective, self.world = objective, world

    def __call__(self, request: StepRequest) -> Any:
        return self._objective(request)

    def train(self) -> None:
        self._objective.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float, admit: Callable[[float], bool]) -> tuple[float, bool]:
        return 1.0, admit(1.0)


def block(model: ModelConfig, guided: bool) -> dict[str, Outcome]:
    """The last block of a model in bf16: forward and backward in training, and a forward in inference."""
    outcomes: dict[str, Outcome] = {}
    for mode in ("inference", "forward"):
        network = on_meta(lambda: build_model(model))
        with pretended_device(rows_of(model)) as watch:
            on_device(network, torch.bfloat16).train(mode == "forward")
            part = network.blocks[-1]
            with watch:  # it answers reads
                inputs = inputs_of(network, part, guided)
                watch.clear()
                with torch.set_grad_enabled(mode == "forward"):
                    y, record = part(*inputs)
                outcomes[mode] = outcome(watch)
            if mode == "forward":
                outcomes["backward"] = _backward(watch, y, record)
    return outcomes


def inputs_of(network: Backbone, part: nn.Module, guided: bool, images: int = IMAGES) -> Any:
    """What a call of the model gives to a block, as leaves that want a gradient where the model would send one on."""
    given: list[Any] = []
    hook = part.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    item = trajectories(network.config, images=images)
    network(item.x0, item.times[0], item.condition, item.x0 if guided else None)
    hook.remove()

    def leaf(x: Any) -> Any:
        return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(leaf, given[0])


def _backward(watch: Watch, y: Tensor, record: Routing | None) -> Outcome:
    """Backward of all through which losses of a step send gradients into a block."""
    outputs = with_gradients(y, record)
    gradients = [torch.empty_like(each) for each in outputs]
    watch.clear()
    with watch:
        torch.autograd.backward(outputs, gradients)
    return outcome(watch)


def with_gradients(y: Tensor, record: Routing | None) -> list[Tensor]:
    read = () if record is None else (record.gates, record.capacity_logits)
    return [y, *(each for each in read if each is not None)]


def _conditionings(router: str) -> tuple[str, ...]:
    """Those that a family has been published with, or takes."""
    if FAMILIES[router].published.get("unconditional_expert"):
        return ("class",)
    return ("text",) if router == "nucleus" else ("class", "text")


def _every_training() -> Iterator[tuple[str, str, str, str]]:
    """Router, conditioning, dtype and schedule: all families with all of each, not all with all."""
    for router, schedule in itertools.product(FAMILIES, SCHEDULES):
        yield router, _conditionings(router)[0], "bf16", schedule
    for router, dtype in itertools.product(FAMILIES, DTYPES):
        yield from ((router, conditioning, dtype, "plain") for conditioning in _conditionings(router))


def _is_usual(router: str, conditioning: str, dtype: str, schedule: str) -> bool:
    """Whether a case is not left to the sweep: all families once, DiffMoE with all schedules, dtypes and conditions."""
    return router == "diffmoe" or (conditioning == _conditionings(router)[0] and (dtype, schedule) == ("bf16", "plain"))


def _trained(usual: bool) -> Iterator[tuple[str, Outcome]]:
    for case in dict.fromkeys(_every_training()):
        if _is_usual(*case) == usual:
            router, conditioning, dtype, schedule = case
            found = training(model_config(router, conditioning), dtype, schedule, with_routing=schedule == "plain")
            yield " ".join(case), found


def _drawn(usual: bool) -> Iterator[tuple[str, Outcome]]:
    for router, dtype in itertools.product(FAMILIES, DTYPES):
        for conditioning in _conditionings(router):
            if _is_usual(router, conditioning, dtype, "plain") == usual:
                found = drawing(model_config(router, conditioning), dtype)
                yield f"{router} {conditioning} {dtype} euler", found
    if usual:
        yield "diffmoe class bf16 heun", drawing(model_config("diffmoe"), "bf16", "heun")


def _steps() -> Iterator[tuple[str, Outcome]]:
    for router in FAMILIES:
        yield router, whole_step(model_config(router), "plain", 1)
    for router in ("diffmoe", "ec", "tc"):
        yield f"{router}, three steps", whole_step(model_config(router), "plain", 3)
        yield f"{router}, four blocks", whole_step(model_config(router, depth=4), "plain", 1)
        yield f"{router}, two passes", whole_step(model_config(router), "two_pass", 2)
    yield "diffmoe, with routing", whole_step(model_config("diffmoe"), "plain", 1, with_routing=True)


def block_cases(**fields: Any) -> Iterator[tuple[str, ModelConfig, bool]]:
    """Name, model and whether the block is guided."""
    for router in FAMILIES:
        several = _conditionings(router)
        conditionings = several if router in ("dense", "diffmoe") else several[:1]
        for conditioning, guided in itertools.product(conditionings, (False, True)):
            if guided and router == "dense":
                continue
            name = f"{router} {conditioning} {'guided' if guided else 'base'}"
            yield name, model_config(router, conditioning, **fields), guided


def _blocks() -> Iterator[tuple[str, Outcome]]:
    for name, model, guided in block_cases():
        yield from ((f"{name} {part}", found) for part, found in block(model, guided).items())


@contextmanager
def _inserted(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have every router pass its scores through `change`."""
    original = routers.score_logits
    routers.score_logits = lambda logits, kind: change(original(logits, kind))  # type: ignore[assignment]
    try:
        yield
    finally:
        routers.score_logits = original


FAULTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "a vector of the host": lambda scores: scores + torch.ones(scores.shape[-1], device="cpu"),
    "a number of the host": lambda scores: scores * torch.ones((), device="cpu"),
    "item": lambda scores: scores * scores.max().item(),
    "if": lambda scores: scores if scores.isfinite().all() else -scores,
    "tolist": lambda scores: scores * scores.amax((0, 1)).tolist()[0],
    "copy to the host": lambda scores: scores + 0 * len(scores.detach().cpu()),
    "copy from the host": lambda scores: scores + torch.ones(scores.shape[-1], device="cpu").to(scores.device),
    "mask as index": lambda scores: scores + 0 * scores[scores > 0].sum(),
    "nonzero": lambda scores: scores + 0 * (scores > 0).nonzero().sum(),
    "one more kernel": lambda scores: scores + 1,
}


def _faults() -> Iterator[tuple[str, Outcome]]:
    for name, change in FAULTS.items():
        with _inserted(change):
            yield name, training(model_config("diffmoe"), "bf16", steps=1)


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Outcome]]]] = {
    "trained": lambda: _trained(usual=True),
    "trained_sweep": lambda: _trained(usual=False),
    "drawn": lambda: _drawn(usual=True),
    "drawn_sweep": lambda: _drawn(usual=False),
    "steps": _steps,
    "blocks": _blocks,
    "faults": _faults,
}
