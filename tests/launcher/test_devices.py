"""--device: `auto` and the devices of this machine; anything else is refused with what there is."""

import argparse

import pytest
import torch

from launcher.devices import device_name


def pretend(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (1, "cuda")])
def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, count: int, expected: str) -> None:
    pretend(monkeypatch, count)
    assert device_name("auto") == expected


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:1"])
def test_a_device_of_the_machine_is_taken(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    pretend(monkeypatch, 2)
    assert device_name(text) == text


@pytest.mark.parametrize(
    ("count", "text", "words"),
    [
        (0, "cuda", "cpu only"),
        (1, "cuda:1", "cpu and cuda:0 on"),
        (2, "cuda:2", "cpu and cuda:0 to cuda:1"),
        (0, "gpu", "allowed: auto"),
        (0, "meta", "cpu only"),
    ],
)
def test_another_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, text: str, words: str) -> None:
    pretend(monkeypatch, count)
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        device_name(text)


def test_a_variable_that_hides_the_devices_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_name("auto") == "cpu"
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"cpu only on this machine \(DS_ACCELERATOR=cpu is set; unset"
    ):
        device_name("cuda")
