"""Kernels of a block, forward and backward, counted on pretended CUDA tensors: bounds that follow the code.

An operator counts as one kernel (`watch.Watch`), so the counts compare versions of the code and are no timings. Where
a count falls, lower the bound, and the table in docs/performance.md with it.
"""

from collections.abc import Callable

import pytest

from tests.pretend_cuda.conftest import ROOT, Outcomes

Pretended = Callable[[str], Outcomes]

BOUNDS = {  # block in bf16: forward, backward, forward of inference
    "dense class base": (19, 40, 19),
    "dense text base": (29, 56, 29),
    "tc class base": (56, 56, 56),
    "tc class guided": (65, 74, 65),
    "ec class base": (48, 56, 48),
    "ec class guided": (57, 74, 57),
    "diffmoe class base": (55, 72, 66),
    "diffmoe class guided": (64, 90, 75),
    "diffmoe text base": (65, 88, 76),
    "diffmoe text guided": (74, 106, 85),
    "promoe_tc class base": (83, 92, 71),
    "promoe_tc class guided": (92, 110, 80),
    "promoe_ec class base": (81, 92, 69),
    "promoe_ec class guided": (90, 110, 78),
    "dsmoe class base": (80, 105, 80),
    "dsmoe class guided": (89, 123, 89),
    "dit_moe class base": (62, 81, 62),
    "dit_moe class guided": (71, 99, 71),
    "race class base": (67, 63, 56),
    "race class guided": (76, 81, 65),
}
PARTS = ("forward", "backward", "inference")


@pytest.mark.slow
def test_no_block_launches_more(pretended: Pretended) -> None:
    outcomes = pretended("blocks")
    assert len(outcomes) == len(PARTS) * len(BOUNDS)
    for block, row in BOUNDS.items():
        assert tuple(outcomes[f"{block} {part}"]["launches"] for part in PARTS) == row, block


def test_the_documented_counts_are_these() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for block, (forward, backward, inference) in BOUNDS.items():
        assert f"| {block} |" in page, block
        row = next(line for line in page.splitlines() if line.startswith(f"| {block} |"))
        assert row.split("|")[-4:-1] == [f" {forward} ", f" {backward} ", f" {inference} "], row
