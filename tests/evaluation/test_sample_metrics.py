"""Figures of sets of samples: arithmetic on a simple extractor, reactions of the packaged one to what spoils a set."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from launcher.evaluate import main
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation import distances
from sharpmoe.evaluation.distances import Gaussian
from sharpmoe.evaluation.extractors import EXTRACTORS, Extractor, ExtractorOptions, Features, open_extractor
from sharpmoe.evaluation.metrics import METRICS, MetricSettings
from sharpmoe.evaluation.sample_metrics import figures_table, judge_sets
from tests.fixtures_data import ShapesSource, listing

RANDOM = np.random.default_rng(0)


def means(images: Tensor) -> Features:
    """Ten numbers of an image: means of its rows."""
    return Features(images.float().mean((1, 3)), images.float()[:, 0].flatten(1), images.float().mean((1, 3)) / 50)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ExtractorOptions:
    extractor = Extractor(name="rows", compute=means, about={"weights": "none"}, is_inception=True)
    monkeypatch.setitem(EXTRACTORS, "rows", lambda options: extractor)
    return ExtractorOptions("rows")


def batch(path: Path, count: int, seed: int, **more: np.ndarray) -> str:
    pixels = np.random.default_rng(seed).integers(0, 200 + 20 * seed, (count, 10, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels, **more)
    return str(path)


def test_figures_are_the_distances_of_the_features(rows: ExtractorOptions, tmp_path: Path) -> None:
    real, fake = batch(tmp_path / "real.npz", 50, 0), batch(tmp_path / "fake.npz", 40, 1)
    settings = MetricSettings(
        metrics=("fd", "sfid", "kid", "pr", "is", "cmmd"), batch_size=7, subset_size=30, subsets=4
    )
    found = judge_sets([fake], real, rows, settings)[0]
    x, y = (means(torch.from_numpy(np.load(place)["arr_0"]).permute(0, 3, 1, 2)) for place in (real, fake))
    kid = distances.kernel_distance(x.pool, y.pool, subsets=4, subset_size=30)
    assert {name: figure.value for name, figure in found.figures.items()} == pytest.approx(
        {
            "fid": distances.frechet_distance(Gaussian.of(x.pool), Gaussian.of(y.pool)),
            "sfid": distances.frechet_distance(Gaussian.of(x.spatial), Gaussian.of(y.spatial)),
            "kid": kid.mean,
            "precision": distances.precision_recall(x.pool, y.pool).precision,
            "recall": distances.precision_recall(x.pool, y.pool).recall,
            "is": distances.inception_score(y.logits).mean,
            "cmmd": distances.gaussian_mmd(x.pool, y.pool),
        }
    )
    assert found.figures["kid"].error == pytest.approx(kid.deviation / 2)
    assert found.protocol["name"] == "FID of 40 images, not FID-50K"
    assert found.protocol["reference"]["count"] == 50


def test_a_part_of_the_samples_and_the_error_of_a_draw(rows: ExtractorOptions, tmp_path: Path) -> None:
    real, fake = batch(tmp_path / "real.npz", 60, 0), batch(tmp_path / "fake.npz", 60, 1)
    part = judge_sets([fake], real, rows, MetricSettings(metrics=("fd",), images=30, bootstrap=8, batch_size=16))[0]
    np.savez(tmp_path / "half.npz", arr_0=np.load(fake)["arr_0"][:30])
    half = judge_sets([str(tmp_path / "half.npz")], real, rows, MetricSettings(metrics=("fd",), bootstrap=8))[0]
    assert part.figures == half.figures
    assert 0 < half.figures["fid"].error < half.figures["fid"].value
    assert math.isnan(judge_sets([fake], real, rows, MetricSettings(metrics=("fd",)))[0].figures["fid"].error)


@pytest.mark.parametrize(("metric", "count"), [("fd", 1), ("kid", 1), ("sfid", 1), ("pr", 3)])
def test_too_few_images_are_refused(rows: ExtractorOptions, tmp_path: Path, metric: str, count: int) -> None:
    few, real = batch(tmp_path / "few.npz", count, 0), batch(tmp_path / "real.npz", 9, 1)
    settings = MetricSettings(metrics=(metric,))
    for samples, reference in ((few, real), (real, few)):
        with pytest.raises(ConfigError, match=rf"{metric}: few has {count} images, expected {count + 1} or more"):
            judge_sets([samples], reference, rows, settings)
    with pytest.raises(ConfigError, match=f"real has {count} images"):
        judge_sets([real], real, rows, MetricSettings(metrics=(metric,), images=count))
    judge_sets([batch(tmp_path / "enough.npz", count + 1, 0)], real, rows, settings)


def test_sets_of_one_file_name_are_told_apart(rows: ExtractorOptions, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    places = [batch(tmp_path / name / "adm.npz", 9, seed) for seed, name in enumerate("ab")]
    settings = MetricSettings(metrics=("fd",))
    assert [each.samples for each in judge_sets(places, places[0], rows, settings)] == ["a/adm", "b/adm"]
    named = judge_sets(places, places[0], rows, settings, names=("before", "after"))
    assert [each.samples for each in named] == ["before", "after"]
    for names in (("one",), ("same", "same")):
        with pytest.raises(ConfigError, match="expected 2 different names"):
            judge_sets(places, places[0], rows, settings, names=names)
    with pytest.raises(ConfigError, match="give names of their own"):
        judge_sets([places[0], places[0]], places[0], rows, settings)


def test_statistics_replace_the_images_where_they_suffice(rows: ExtractorOptions, tmp_path: Path) -> None:
    real, fake = batch(tmp_path / "real.npz", 50, 0), batch(tmp_path / "fake.npz", 40, 1)
    pool = Gaussian.of(means(torch.from_numpy(np.load(real)["arr_0"]).permute(0, 3, 1, 2)).pool)
    np.savez(tmp_path / "stats.npz", mu=pool.mean, sigma=pool.covariance)
    one = MetricSettings(metrics=("fd",))
    by_images, by_statistics = (
        judge_sets([fake], place, rows, one)[0].figures for place in (real, str(tmp_path / "stats.npz"))
    )
    assert by_images["fid"].value == pytest.approx(by_statistics["fid"].value, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "fd"], "--metrics fd needs --reference"),
        (
            ["--metrics", "fd,fid50k", "--reference", "SET"],
            "--metrics fid50k: expected some of fd, sfid, is, kid, pr, cmmd",
        ),
        (
            ["--metrics", "fid"],
            "; here it is: fd with --extractor inception --extractor-weights FILE (the Inception of",
        ),
        (["--metrics", "retrival"], "; did you mean retrieval?"),
        (["--metrics", "sfid", "--reference", "SET"], "--metrics sfid is defined with --extractor inception"),
        (["--metrics", "fd", "--reference", "SET", "--extractor", "inception"], "needs --extractor-weights"),
        (["--metrics", "fd", "--reference", "gone.npz"], "gone.npz: no set of images"),
        pytest.param(
            ["--metrics", "fd", "--reference", "SET", "--extractor", "clip", "--extractor-weights", "nowhere"],
            "nowhere: no CLIPVisionModelWithProjection in safetensors",
            marks=pytest.mark.slow,  # imports transformers
        ),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = batch(tmp_path / "a.npz", 5, 0)
    argv = [place, *(place if word == "SET" else word for word in words), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    source = ShapesSource(40)
    items = sorted(listing(source).items, key=lambda item: item.label)
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(source.read(item))).convert("RGB").resize((64, 64))) for item in items]
    )


def noisy(images: np.ndarray) -> np.ndarray:
    return (images + RANDOM.normal(0, 40, images.shape)).clip(0, 255).astype(np.uint8)


def blurred(images: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))) for image in images])


@pytest.mark.slow
def test_the_packaged_extractor_sees_what_spoils_a_set(pictures: np.ndarray, tmp_path: Path) -> None:
    real, own = pictures[::2], pictures[1::2]
    sets = {
        "own": own,
        "noise": noisy(own),
        "blur": blurred(own),
        "one_class": own[:5].repeat(4, 0),
        "collapse": own[:1].repeat(20, 0),
    }
    np.savez(tmp_path / "real.npz", arr_0=real)
    places = []
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        places.append(str(tmp_path / f"{name}.npz"))
    settings = MetricSettings(metrics=("fd", "kid", "pr"), subset_size=16, subsets=20)
    found = judge_sets(places, str(tmp_path / "real.npz"), ExtractorOptions("efficientnet-lite0"), settings)
    by_name = {each.samples: each.figures for each in found}
    for name in ("noise", "blur", "one_class", "collapse"):
        assert by_name[name]["fd"].value > 1.5 * by_name["own"]["fd"].value, name
        assert by_name[name]["kid"].value > 3 * abs(by_name["own"]["kid"].value), name
    assert by_name["collapse"]["recall"].value < 0.1 < by_name["own"]["recall"].value
    table = figures_table(found)
    assert table.splitlines()[-1] == "FD, efficientnet-lite0, 20 images"


def test_the_command_writes_figures_with_their_protocol(
    rows: ExtractorOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", EXTRACTORS["rows"])
    fake = batch(tmp_path / "fake.npz", 20, 1)
    words = [
        fake,
        "--metrics",
        "fd,is",
        "--reference",
        batch(tmp_path / "real.npz", 20, 0),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 0
    assert "FID of 20 images, not FID-50K" in capsys.readouterr().out
    written = json.loads((tmp_path / "o" / "fake.figures.json").read_text())
    assert set(written["figures"]) == {"fid", "is"}
    assert written["figures"]["fid"]["error"] is None
    assert written["protocol"]["samples"]["count"] == 20


def test_an_unknown_extractor_names_the_others() -> None:
    with pytest.raises(ConfigError, match="expected one of efficientnet-lite0, inception, clip, dinov2"):
        open_extractor(ExtractorOptions("vgg"))
    assert set(METRICS) == {"fd", "sfid", "is", "kid", "pr", "cmmd", "accuracy", "clipscore", "retrieval"}
