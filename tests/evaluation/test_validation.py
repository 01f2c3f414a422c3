import pytest

from sharpmoe.evaluation.held_out import ALONE
from sharpmoe.evaluation.validation import VALIDATION_TIMES, validate
from tests.toys import ToySamples, toy_model


def test_validation_is_repeatable_and_named_by_time() -> None:
    first, second = (validate(toy_model(), ToySamples(), images=6, chunk=4, share=ALONE) for _ in range(2))
    assert first == second
    assert first.images == 6
    assert first.error > 0
    assert first.mean == pytest.approx(sum(first.by_time.values()) / 8)
    named = first.scalars()
    assert list(named) == ["validation/flow", *(f"validation/flow_t{t:g}" for t in VALIDATION_TIMES)]
    assert validate(toy_model(), ToySamples(), images=6, chunk=4, seed=1).mean != first.mean
