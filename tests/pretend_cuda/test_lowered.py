"""Kernels of a compiled block, as Inductor lowers it for a pretended H100: counts that follow the code and torch."""

from collections.abc import Callable

import pytest

from sharpmoe.families import FAMILIES
from tests.pretend_cuda.conftest import ROOT, Outcomes

Pretended = Callable[[str], Outcomes]

COUNTS = {  # compiled block in bf16, width 1024, 32 images of 256 tokens: forward, backward, forward of inference
    "dense class base": (10, 29, 10),
    "dense text base": (15, 44, 15),
    "tc class guided": (35, 49, 34),
    "ec class guided": (30, 50, 29),
    "diffmoe class guided": (36, 60, 53),
    "diffmoe text guided": (41, 75, 58),
    "promoe_tc class guided": (48, 61, 40),
    "promoe_ec class guided": (63, 73, 54),
    "dsmoe class guided": (40, 59, 39),
    "dit_moe class guided": (38, 59, 37),
    "race class guided": (45, 62, 45),
    "nucleus text guided": (47, 78, 47),
}
PARTS = ("forward", "backward", "inference")


def check(outcomes: Outcomes, blocks: list[str]) -> None:
    for block in blocks:
        found = {part: outcomes[f"{block} {part}"] for part in PARTS}
        assert tuple(found[part]["launches"] for part in PARTS) == COUNTS[block], found


@pytest.mark.slow
@pytest.mark.timeout(300)  # Inductor imports and traces for ten seconds of processor time and more
def test_the_block_of_the_goal(pretended: Pretended) -> None:
    outcomes = pretended("compiled")
    check(outcomes, ["diffmoe class guided"])
    training = [outcomes[f"diffmoe class guided {part}"] for part in ("forward", "backward")]
    assert [found["graphs"] for found in training] == [1, 1]
    assert training[0]["uncompiled"] == {}


@pytest.mark.sweep
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", sorted({block.split()[0] for block in COUNTS}))
def test_every_family(pretended: Pretended, family: str) -> None:
    outcomes = pretended(f"compiled {family}")
    check(outcomes, [block for block in COUNTS if block.split()[0] == family])


def test_no_family_is_left_out() -> None:
    assert {block.split()[0] for block in COUNTS} == set(FAMILIES)


def test_the_documented_counts_are_these() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for block, counts in COUNTS.items():
        assert f"| {block} | " + " | ".join(map(str, counts)) + " |" in page, block
