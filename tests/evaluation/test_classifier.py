"""The classifier that judges samples: it learns, is the same for a seed, and is an extractor."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.read.shards import ShardSet
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.classifier import ClassifierSettings, load_classifier, train_classifier
from sharpmoe.evaluation.extractors import ExtractorOptions, open_extractor
from sharpmoe.evaluation.sample_metrics import MetricSettings, judge_sets
from tests.fixtures_data import make_shards

SETTINGS = ClassifierSettings(epochs=40, batch_size=20, lr=1e-2, width=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], ShardSet]:
    folder = tmp_path_factory.mktemp("classifier")
    shards = make_shards(folder / "shards", 48, channels=16)
    train = ShardSet.open(shards, "train")
    path = folder / "classifier.safetensors"
    return path, train_classifier(path, train, train, SETTINGS), train


def test_it_learns_its_training_data(trained: tuple[Path, dict[str, object], ShardSet]) -> None:
    _, card, _ = trained
    assert card["num_classes"] == 4
    assert float(str(card["accuracy"])) > 0.9


def test_the_same_seed_gives_the_same_file(trained: tuple[Path, dict[str, object], ShardSet], tmp_path: Path) -> None:
    _, _, train = trained
    few = SETTINGS.model_copy(update={"epochs": 2})
    for name in ("a", "b"):
        torch.rand(3)  # whatever the process has drawn before
        train_classifier(tmp_path / name, train, train, few)
    train_classifier(tmp_path / "c", train, train, few.model_copy(update={"seed": 1}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_accuracy_of_samples_follows_their_order(
    trained: tuple[Path, dict[str, object], ShardSet], tmp_path: Path
) -> None:
    """Samples in the order of the classes are right, and turned by one place they are wrong."""
    path, _, train = trained
    batch = train.batch(range(train.num_samples))
    pixels = (127.5 * train.codec_object().decode(batch.latent) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    of_class = [np.flatnonzero(batch.label.numpy() == label) for label in range(4)]
    order = [int(of_class[number % 4][number // 4 % 5]) for number in range(20)]
    np.savez(tmp_path / "right.npz", arr_0=pixels[order])
    np.savez(tmp_path / "turned.npz", arr_0=pixels[order[1:] + order[:1]])
    options = ExtractorOptions("classifier", path)
    places = [str(tmp_path / "right.npz"), str(tmp_path / "turned.npz")]
    right, turned = judge_sets(places, places[0], options, MetricSettings(metrics=("accuracy", "fd")))
    assert right.figures["accuracy"].value > 0.9
    assert turned.figures["accuracy"].value < 0.1
    assert right.figures["fd"].value == pytest.approx(0, abs=1e-3)
    assert right.protocol["name"] == "FD, classifier, 20 images"
    (tmp_path / "right.json").write_text('{"labels": "balanced: image i has class i mod 4"}')
    (tmp_path / "turned.json").write_text('{"labels": "balanced: image i has class i mod 10"}')
    with pytest.raises(
        ConfigError, match=r"--metrics accuracy: .*turned\.npz was drawn of 10 classes, classifier knows"
    ):
        judge_sets(places, None, options, MetricSettings(metrics=("accuracy",)))


def test_accuracy_needs_an_extractor_that_knows_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    pytest.importorskip("efficientnet_lite_pytorch")
    options, place = ExtractorOptions("efficientnet-lite0"), str(tmp_path / "x.npz")
    with pytest.raises(ConfigError, match="--metrics accuracy needs --extractor classifier"):
        judge_sets([place], place, options, MetricSettings(metrics=("accuracy",)))


def test_other_files_and_other_sizes_are_refused(
    trained: tuple[Path, dict[str, object], ShardSet], tmp_path: Path
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"x\.safetensors: no classifier"):
        load_classifier(tmp_path / "x.safetensors")
    extractor = open_extractor(ExtractorOptions("classifier", trained[0]))
    with pytest.raises(DataError, match=r"images of 16 x 8 pixels: .* was trained on 32 x 32"):
        extractor.compute(torch.zeros(1, 3, 8, 16, dtype=torch.uint8))
