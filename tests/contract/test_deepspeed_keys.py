"""The keys that ds_config knows are those that the installed DeepSpeed reads; an upgrade that moves one shows here."""

from collections.abc import Callable
from typing import Any

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

from sharpmoe.parallel.zero.config import _OWNED_BY_RUN, _REFUSED, _REMOVED, _SCALARS, _SECTIONS


class Recorder(dict):
    """A dict that notes every key it was asked for."""

    asked: set[str]

    def __init__(self, **content: Any) -> None:
        super().__init__(**content)
        self.asked = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:  # `x in d.keys()` is how DeepSpeed asks
        return self

    def __copy__(self) -> "Recorder":
        return self


def keys_read(section: str | None = None) -> set[str]:
    inner = Recorder()
    content: dict[str, Any] = {"train_batch_size": 1} | ({section: inner} if section else {})
    outer = Recorder(**content)
    DeepSpeedConfig(outer)
    return inner.asked if section else outer.asked


def test_top_level_keys():
    known = {*_OWNED_BY_RUN, *_SECTIONS, *_SCALARS, *_REFUSED}
    only_in_a_group = {"sequence_parallel_size"}  # read where an earlier test of this process has made a process group
    assert (keys_read() | set(_REMOVED)) - only_in_a_group == known - only_in_a_group
    assert only_in_a_group <= known


def test_removed_keys():
    assert set(_REMOVED) == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)


@pytest.mark.parametrize("section", [name for name, kind in _SECTIONS.items() if isinstance(kind, frozenset)])
def test_keys_of_sections_that_deepspeed_reads_as_plain_dicts(section):
    assert keys_read(section) == _SECTIONS[section]


def test_no_key_has_two_owners():
    groups: list[set[str]] = [set(_OWNED_BY_RUN), set(_SECTIONS), set(_SCALARS), set(_REFUSED)]
    assert sum(len(group) for group in groups) == len(set.union(*groups))


@pytest.mark.parametrize("section", ["bf16", "zero_optimization", "compile", "comms_logger"])
def test_typed_sections_refuse_unknown_keys_themselves(section):
    """We rely on DeepSpeed's own models for the values."""
    kind: Callable[..., Any] = _SECTIONS[section]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="xyzzy"):
        kind(xyzzy=1)
