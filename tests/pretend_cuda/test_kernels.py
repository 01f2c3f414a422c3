"""Kernels of a block, forward and backward, counted on pretended CUDA tensors: bounds that follow the code.

An operator counts as one kernel (`watch.Watch`), so the counts compare versions of the code and are no timings. Where
a count falls, lower the bound, and the table in docs/performance.md with it.
"""

from collections.abc import Callable

import pytest

from tests.pretend_cuda.conftest import ROOT, Outcomes

Pretended = Callable[[str], Outcomes]

BOUNDS = {  # block in bf16: forward, backward, forward of inference
    "dense class base": (15, 40, 15),
    "dense text base": (21, 56, 21),
    "tc class base": (47, 58, 47),
    "tc class guided": (54, 69, 54),
    "ec class base": (36, 58, 36),
    "ec class guided": (43, 69, 43),
    "diffmoe class base": (42, 68, 59),
    "diffmoe class guided": (49, 79, 66),
    "diffmoe text base": (48, 84, 65),
    "diffmoe text guided": (55, 95, 72),
    "promoe_tc class base": (76, 92, 64),
    "promoe_tc class guided": (83, 103, 71),
    "promoe_ec class base": (77, 92, 65),
    "promoe_ec class guided": (84, 103, 72),
    "dsmoe class base": (71, 95, 71),
    "dsmoe class guided": (78, 106, 78),
    "dit_moe class base": (53, 71, 53),
    "dit_moe class guided": (60, 82, 60),
    "race class base": (57, 62, 50),
    "race class guided": (64, 73, 57),
    "nucleus text base": (105, 175, 105),
    "nucleus text guided": (112, 186, 112),
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
