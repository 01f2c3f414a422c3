"""The Inception network of FID, on seeded random weights: recorded outputs of torch-fidelity 0.4.0's port."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.inception import Inception, load_inception, resize_bilinear_tf1

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 200, 260), dtype=np.uint8))

# torch-fidelity's "2048" and "logits_unbiased" of `seeded` on these images, every 500th
POOL = [0.6945156, 0.04312205, 0.1826069, 3.224677, 0, 0.707472, 0.04504394, 0.1866892, 3.238405, 0]
LOGITS = [-0.1850696, -1.281617, -0.1759118, -0.1727275, -1.284563, -0.1964018]


def seeded() -> Inception:
    """Weights from numpy, whose draws are the same everywhere; norms that are not the identity."""
    random = np.random.default_rng(0)
    model = Inception().eval()
    for name, value in model.state_dict().items():
        if value.dtype != torch.float32:
            continue
        drawn = torch.from_numpy(random.standard_normal(value.shape, dtype=np.float32))
        fan_in = value[0].numel() if value.dim() > 1 else 1
        around_one = name.endswith((".bn.weight", "running_var"))
        value.copy_(1 + 0.2 * drawn.tanh() if around_one else drawn * (2 / fan_in) ** 0.5 * (1 if fan_in > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def model() -> Inception:
    return seeded()


def test_features_are_those_of_the_published_port(model: Inception) -> None:
    pool, spatial, logits = model(IMAGES)
    assert pool.shape == (2, 2048)
    assert spatial.shape == (2, 7 * 17 * 17)
    assert logits.shape == (2, 1008)
    for found, expected in ((pool, POOL), (logits, LOGITS)):
        assert found[:, ::500].flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_spatial_features_are_seven_channels_of_one_branch(model: Inception) -> None:
    seen: list[Tensor] = []
    branch = model.Mixed_6d.get_submodule("branch1x1")
    hook = branch.register_forward_hook(lambda _, __, output: seen.append(output))
    spatial = model(IMAGES).spatial
    hook.remove()
    assert torch.equal(spatial.reshape(2, 7, 17, 17), seen[0][:, :7])


def test_names_and_sizes_are_those_of_the_distributed_file() -> None:
    state = Inception().state_dict()
    assert sum(
        value.numel() for name, value in state.items() if value.is_floating_point() and "running" not in name
    ) == (23_850_960)
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["fc.weight"].shape == (1008, 2048)


def test_resizing_reads_the_places_of_tensorflow_1() -> None:
    """Pixel i of the output reads place i * 4 / 8 of the input: no half pixels, the last pixel repeated."""
    line = torch.tensor([0.0, 10.0, 20.0, 40.0])
    image = line.repeat(4, 1)[None, None]
    expected = [0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 40.0]
    assert resize_bilinear_tf1(image, 8)[0, 0, 3].tolist() == expected
    assert resize_bilinear_tf1(image.mT, 8)[0, 0, :, 3].tolist() == expected


def test_other_weights_are_refused_unless_wanted(model: Inception, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(ConfigError, match=r"weights.pth: sha256 .* expected 6726825d0af5.*--unverified"):
        load_inception(path)
    loaded = load_inception(path, unverified=True)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert not loaded.training


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04"])
def test_a_file_that_holds_no_weights_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no weights of the Inception network") as raised:
        load_inception(path, unverified=True)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="no such file"):
        load_inception(tmp_path / "missing.pth")
