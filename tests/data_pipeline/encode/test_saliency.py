"""The option --saliency: kinds, their options and bounds, and what is part of the identity of shards."""

import hashlib
from pathlib import Path

import pytest

from data_pipeline.encode.saliency import parse_saliency, saliency_line
from data_pipeline.prepare.saliency_kinds import SALIENCIES
from sharpmoe.errors import DataError
from sharpmoe.evaluation.base_error import BASE_ERROR

KINDS = {**SALIENCIES, BASE_ERROR.name: BASE_ERROR}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth", "--saliency depth: kind 'depth'; expected laplacian, foreground, file, supplied, model, base-error"),
        ("laplacian:size=3", "option 'size=3'; expected laplacian"),
        ("foreground:missing=white", "option 'missing=white'; expected foreground:missing=skip|laplacian|flat"),
        ("foreground:path=a.pt", "option 'path=a.pt'; expected foreground:missing"),
        ("model", "--saliency model: names no file; expected model:path=FILE,size=PIXELS"),
        ("model:path=no.pt", "path no.pt is no file; give that of a segmentation or saliency model"),
        ("model:path=no.pt,size=4", "option 'size=4'; expected model:path=FILE"),
        ("model:path=no.pt,size=99999", "option 'size=99999'"),
        ("model:path=no.pt,mean=1/2", "option 'mean=1/2'"),
        ("model:path=no.pt,std=1/0/1", "option 'std=1/0/1'"),
        ("model:path=no.pt,activation=relu", "option 'activation=relu'"),
        ("base-error:path=no.safetensors,times=0/1", "option 'times=0/1'"),
        ("base-error:path=no.safetensors,times=nan", "option 'times=nan'"),
        ("base-error", "--saliency base-error: names no file"),
    ],
)
def test_bad_choices_name_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_saliency(text, KINDS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_and_the_file_are_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    choice = parse_saliency(f"model:path={path},size=320,mean=0/0.5/1", KINDS)
    assert choice.path == str(path)
    assert choice.identity == {
        "kind": "model",
        "file": "net.pt",
        "sha256": digest,
        "size": 320,
        "normalise": "imagenet",
        "output": 0,
        "channel": 0,
        "activation": "none",
        "invert": "no",
        "batch": 8,
        "mean": [0.0, 0.5, 1.0],
    }
    line = choice.line()
    assert line.startswith(f"model (file net.pt, sha256 {digest[:12]}, size 320, normalise imagenet")
    assert "mean 0.0/0.5/1.0" in line


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("laplacian", {"kind": "laplacian"}),
        ("file", {"kind": "supplied"}),
        ("supplied:missing=skip", {"kind": "supplied"}),
        ("foreground:missing=flat", {"kind": "foreground", "missing": "flat"}),
    ],
)
def test_what_earlier_versions_have_stored_is_kept(text: str, identity: dict[str, str]) -> None:
    assert parse_saliency(text, KINDS).identity == identity
    assert saliency_line(identity).startswith(identity["kind"])
