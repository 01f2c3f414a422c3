"""That the benchmark of utilisation times what it says, at toy size."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gemms import Gemm, bare, gemms_of
from benchmarks.harness import Case, Options
from benchmarks.utilisation import step_cases
from sharpmoe.config import ModelConfig
from sharpmoe.model.flops import Call, products

SIZES = {"width": 32, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4, "conditioning": "class"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGES = 3


def toy_cases(precision: str, guided: bool) -> tuple[Options, list[Case]]:
    options = Options(torch.device("cpu"), PRECISIONS[precision], precision)
    config = ModelConfig.model_validate(SIZES | {"router": "diffmoe", "saliency_router": guided})
    return options, [planned.build() for planned in step_cases(config, IMAGES, options)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("guided", "works"), [(False, ["backward", "step"]), (True, ["guided"])])
def test_every_work_runs_and_counts_images(guided: bool, works: list[str], precision: str) -> None:
    _, cases = toy_cases(precision, guided)
    assert [case.name for case in cases] == [f"utilisation.{work}_{precision}" for work in works]
    for case in cases:
        assert case.check is not None
        assert case.limit is not None
        case.check()
        assert case.ours() == case.limit() == IMAGES


@pytest.mark.parametrize("guided", [False, True])
def test_the_limit_multiplies_as_much_as_the_step(guided: bool) -> None:
    _, cases = toy_cases("fp32", guided)
    counts = []
    for work in (cases[-1].ours, cases[-1].limit):
        assert work is not None
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == round(IMAGES * 1e9 * cases[-1].facts["gflop"])


def test_shapes_of_forward_and_backward() -> None:
    done = products(ModelConfig.model_validate(SIZES | {"router": "ec"}), Call(images=2, tokens=16, rows=32))
    routed = [gemm for gemm in gemms_of(done, 4) if gemm.times == 1 and 128 in gemm[1:4] and 8 in gemm[1:4]]
    there, weight, rows = Gemm(4, 8, 32, 128, 1), Gemm(4, 128, 8, 32, 1), Gemm(4, 8, 128, 32, 1)
    back = Gemm(4, 8, 128, 32, 1), Gemm(4, 32, 8, 128, 1), Gemm(4, 8, 32, 128, 1)
    assert routed == [there, weight, rows, *back]
    run = bare(routed[:1], Options(torch.device("cpu"), torch.float32, "fp32"))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == there.flops == 2 * 4 * 8 * 32 * 128
