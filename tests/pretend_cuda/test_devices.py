"""Training under every schedule and sampling of every family on pretended CUDA tensors: one device, no host in between.

The numbers of nothing are tested here: the tensors hold none.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES
from sharpmoe.model.build import build_model
from sharpmoe.model.captured import check_capture
from tests.pretend_cuda.conftest import Outcomes
from tests.toys import toy_config

pytestmark = pytest.mark.slow
Pretended = Callable[[str], Outcomes]

# Copies from the host that are meant: of a sampling run the noise and the times, once per batch of images.
NOISE_AND_TIMES = {"_to_copy sharpmoe/sampling.py:generate": 2}
COUNTED, SPLIT = "item sharpmoe/moe/dispatch.py:_count_rows", "tolist sharpmoe/moe/products.py:row_layout"
# Calls of the model with two steps of a rollout or of sampling, recomputed ones included, and how many are replays.
CALLS = {
    "plain": (2, 0),
    "checkpoint": (4, 0),
    "two_pass": (4, 2),
    "hybrid": (3, 1),
    "segments": (2, 0),
    "euler": (2, 0),
    "heun": (3, 0),
}
GROUPS = ["{}", pytest.param("{}_sweep", marks=pytest.mark.sweep)]


def layers(router: str) -> int:
    return 2 if FAMILIES[router].published.get("moe_every") == 1 else 1


def reads_of_rows(router: str, dtype: str, schedule: str, *, training: bool) -> dict[str, int]:
    """Reads of row counts, per MoE layer and call: their sum where no rule fixes it, and in float32 each expert's.

    An unconditional expert takes as many images as have no class; inference by thresholds takes what exceeds them. A
    replay of a competition of all pairs may be of several calls at once, and does not know. The grouped product, which
    reads nothing, is for bf16.
    """
    family = FAMILIES[router]
    if not family.has_experts:
        return {}
    fixed, unconditional = family.fixed_rows(training), family.published.get("unconditional_expert", False)
    calls, replays = CALLS[schedule]
    unknown = calls if fixed is None or (fixed == "each" and unconditional) else 0
    if fixed == "total" and family.competition == "all":
        unknown = replays
    splits = 0 if dtype == "bf16" or (fixed == "each" and not unconditional) else calls
    counts = {COUNTED: unknown * layers(router), SPLIT: splits * layers(router)}
    return {name: count for name, count in counts.items() if count}


def check(outcomes: Outcomes, copies: dict[str, int], *, training: bool) -> None:
    assert {case: found["error"] for case, found in outcomes.items() if "error" in found} == {}
    for case, found in outcomes.items():
        router, _, dtype, schedule = case.split()
        assert found["mixed"] == {}, case
        assert found["copies"] == copies, case
        assert found["reads"] == reads_of_rows(router, dtype, schedule, training=training), case


@pytest.mark.parametrize("group", GROUPS)
def test_training(pretended: Pretended, group: str) -> None:
    outcomes = pretended(group.format("trained"))
    assert {case.split()[0] for case in outcomes} | {"diffmoe"} == set(FAMILIES)  # the sweep has no more of DiffMoE
    check(outcomes, {}, training=True)


@pytest.mark.parametrize("group", GROUPS)
def test_sampling(pretended: Pretended, group: str) -> None:
    outcomes = pretended(group.format("drawn"))
    assert {case.split()[0] for case in outcomes} | {"diffmoe"} == set(FAMILIES)
    check(outcomes, NOISE_AND_TIMES, training=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("router", FAMILIES)
def test_calls_that_read_nothing_are_those_that_a_cuda_graph_may_hold(router: str, dtype: str) -> None:
    """The reads are those that `test_sampling` has seen."""
    fields = {"dense_first": 2} if router == "nucleus" else {}
    if FAMILIES[router].published.get("unconditional_expert"):
        fields = {"conditioning": "class"}
    with torch.device("meta"):
        model = build_model(toy_config(router, **fields)).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=next(model.parameters()).dtype)
    on_gpu: Any = SimpleNamespace(parameters=lambda: iter([weight]), config=model.config, moe_layers=model.moe_layers)
    allowed = True
    try:
        check_capture(on_gpu)
    except ConfigError:
        allowed = False
    assert allowed == (reads_of_rows(router, dtype, "euler", training=False) == {})


CAUGHT = {  # a fault that is inserted in the router -> what reports it, once in each of the two MoE calls
    "a number of the host": ("mixed", "mul sharpmoe/moe/router.py:route"),
    "item": ("reads", "item sharpmoe/moe/router.py:route"),
    "if": ("reads", "item sharpmoe/moe/router.py:route"),
    "tolist": ("reads", "tolist sharpmoe/moe/router.py:route"),
    "copy to the host": ("reads", "_to_copy sharpmoe/moe/router.py:route"),
    "copy from the host": ("copies", "_to_copy sharpmoe/moe/router.py:route"),
}
REFUSED = {  # a fault -> the error with which it ends
    "a vector of the host": "found at least two devices, cuda:0 and cpu",
    "mask as index": "DynamicOutputShapeException: aten.nonzero",
    "nonzero": "DynamicOutputShapeException: aten.nonzero",
}


def test_without_a_fault_nothing_is_reported(pretended: Pretended) -> None:
    found = pretended("faults")["none"]
    assert (found["reads"], found["copies"], found["mixed"]) == ({}, {}, {})


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_fault_is_reported_with_its_place(pretended: Pretended, fault: str) -> None:
    kind, place = CAUGHT[fault]
    assert pretended("faults")[fault][kind][place] == 1


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_ends_the_work(pretended: Pretended, fault: str) -> None:
    assert REFUSED[fault] in pretended("faults")[fault]["error"]


def test_one_more_kernel_is_counted(pretended: Pretended) -> None:
    outcomes = pretended("faults")
    assert outcomes["one more kernel"]["launches"] == outcomes["none"]["launches"] + 1
