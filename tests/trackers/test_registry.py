"""The table of trackers: what the configuration may name, and what each needs."""

from typing import get_args

import pytest

from sharpmoe.config import LogConfig
from sharpmoe.errors import ConfigError
from sharpmoe.trackers import registry


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    registry.check_trackers(["tensorboard"])
    for name, kind in registry.MIRRORS.items():
        with pytest.raises(ConfigError) as caught:
            registry.check_trackers(["tensorboard", name])
        assert str(caught.value) == (
            f"log.trackers: {name} is not installed; install the extra: pip install 'sharpmoe[trackers]' "
            f"(or pip install {kind.distribution}), or remove it from log.trackers"
        )


def test_the_configuration_names_the_trackers_of_the_table() -> None:
    (names, _) = get_args(LogConfig.model_fields["trackers"].annotation)
    assert set(get_args(names)) == {"tensorboard", *registry.MIRRORS}
