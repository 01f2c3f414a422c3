"""Which optimizer a run gets, and what is said where it cannot have it."""

import pytest
import torch

from sharpmoe.config import OptimConfig
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.zero.optimizers import optimizer_factory


def test_apex_that_is_not_there_names_the_trap() -> None:
    with pytest.raises(ConfigError, match="PyPI's 'apex' is an unrelated package"):
        optimizer_factory(OptimConfig(impl="apex"), torch.device("cpu"))


def test_auto_on_the_host_is_torch_adamw() -> None:
    optim = OptimConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    optimizer = optimizer_factory(optim, torch.device("cpu"))([torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == 0.1
