import pytest

from sharpmoe.config import OptimConfig
from sharpmoe.train.step import _learning_rate


def test_constant_after_warm_up() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    assert [_learning_rate(optim, step, 8) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_ends_at_the_final_rate() -> None:
    optim = OptimConfig(lr=1.0, schedule="cosine", final_lr=0.2, warmup_steps=1)
    rates = [_learning_rate(optim, step, 6) for step in range(6)]
    assert rates[:2] == [1.0, 1.0]
    assert rates[3] == pytest.approx(0.6)
    assert rates[5] == pytest.approx(0.2)
    assert rates[1:] == sorted(rates[1:], reverse=True)
