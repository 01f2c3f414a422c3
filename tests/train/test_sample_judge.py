"""Samples judged while a run trains: the same on any number of ranks, no number of training changes, resume goes on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.read.shards import ShardSet
from sharpmoe.config import LogConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.extractors import EXTRACTORS, Extractor, ExtractorOptions, Features
from sharpmoe.evaluation.held_out import Share
from sharpmoe.log_file import read_log
from sharpmoe.model.build import build_model
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop, sample_judge
from sharpmoe.train.sample_judge import SampleJudge, extractor_bytes, metrics_line
from tests.distributed import run_ranks
from tests.train.setting import ALONE, identical, make_run, plan_for, stirred_model

LOG: dict[str, Any] = {"metrics_every": 2, "metrics_images": 6, "metrics_steps": 2}


def rows_of(images: Tensor) -> Features:
    """Means of the rows of images, and three logits."""
    means = images.float().mean((1, 3)) / 255
    return Features(means[:, :5], logits=means[:, :3])


@pytest.fixture(autouse=True)
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(options: ExtractorOptions) -> Extractor:
        return Extractor(name="rows", compute=rows_of, about={})

    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", opened)


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    assert launch.start() == ALONE
    yield
    launch.stop()


def opened(run: RunConfig) -> SampleJudge:
    held_out = ShardSet.open(run.data.first_place, run.data.validation_split)
    return SampleJudge.open(run, held_out, held_out.codec_object(), torch.device("cpu"))


def test_the_ranks_draw_what_one_would(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_judge, "_BATCH", 3)
    data = {"shards": str(shards), "validation_split": "train"}
    run = make_run(shards, tmp_path, log=LOG | {"metrics_images": 10}, data=data)
    judge, model = opened(run), stirred_model(run)
    alone = judge.draw(model, Share())
    assert len(alone.pool) == len(judge.request.indices) == 10
    parts = [judge.draw(model, Share(rank, 3)) for rank in range(3)]
    assert torch.equal(sum((part.pool for part in parts), torch.zeros(())), alone.pool)
    assert judge.judge(alone)["fd"].value > 0
    own = judge.judge(judge.reference)
    assert own["fd"].value == pytest.approx(0, abs=1e-6)
    assert own["kid"].value <= judge.judge(alone)["kid"].value
    assert judge.title == f"{len(alone.pool)} samples of 2 steps, features of rows"
    assert metrics_line(own).startswith("fd ")


@pytest.mark.slow
def test_a_run_that_judges_trains_the_same_and_resume_keeps_its_curve(shards: Path, tmp_path: Path) -> None:
    found = {}
    for name, log, steps in (("silent", {}, (4,)), ("whole", LOG, (4,)), ("resumed", LOG, (2, 4))):
        for last in steps:
            run = make_run(
                shards, tmp_path, name=name, log=log, checkpoint={"resume": "auto"}, rollout={"num_steps": 2}
            )
            plan = plan_for(run, ALONE)
            if last < 4:
                plan = replace(plan, run=run.model_copy(update={"train": run.train.model_copy(update={"steps": last})}))
            folder = loop.train(plan, ALONE)
        found[name] = {kind: load_file(folder / f"{kind}.safetensors") for kind in ("ema", "live")}
    for kind in ("ema", "live"):
        assert identical(found["silent"][kind], found["whole"][kind])
        assert identical(found["whole"][kind], found["resumed"][kind])
    curves = {name: read_log(tmp_path / name / "log.jsonl") for name in ("whole", "resumed")}
    for tag in ("metrics/fd", "metrics/kid"):
        assert sorted(curves["whole"][tag]) == [0, 2, 4]
        assert curves["whole"][tag] == curves["resumed"][tag]
    assert len(set(curves["whole"]["metrics/fd"].values())) > 1


def judged(world: World, run: RunConfig, stage: int) -> dict[str, dict[int, float]]:
    """Train on `world` and return the figures of the samples by tag and step. A rank imports the table anew."""
    EXTRACTORS["efficientnet-lite0"] = lambda options: Extractor(name="rows", compute=rows_of, about={})
    loop.train(plan_for(run, world, stage), world)
    curves = read_log(Path(run.output) / run.name / "log.jsonl")
    return {tag: curves[tag] for tag in ("metrics/fd", "metrics/kid")}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ep_size"), [(3, 1), (2, 2)])
def test_two_ranks_judge_as_one(shards: Path, tmp_path: Path, stage: int, ep_size: int) -> None:
    """Weights divided among ranks, or experts: each draws its share, and all find what one would."""

    def run(name: str, ep: int) -> RunConfig:
        # SGD: layouts differ by rounding alone, which the normalised steps of Adam would enlarge.
        optim = {"name": "sgd", "lr": 1.0, "ema_decay": 0.1}
        parallel = {"ep_size": ep}
        return make_run(
            shards,
            tmp_path,
            name=name,
            log=LOG,
            train={"steps": 2},
            rollout={"num_steps": 2},
            optim=optim,
            parallel=parallel,
        )

    alone = judged(ALONE, run("one", 1), 3)
    first, second = run_ranks(judged, 2, run("two", ep_size), stage)
    assert first == second
    for tag, curve in alone.items():
        assert first[tag] == pytest.approx(curve, rel=1e-4)
        assert curve[0] != pytest.approx(curve[2], rel=1e-3), "training moves the figures by more than that"


def test_a_classifier_says_how_many_samples_have_their_class(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def classifier(options: ExtractorOptions) -> Extractor:
        return Extractor(name="classifier", compute=rows_of, about={}, num_classes=3)

    monkeypatch.setitem(EXTRACTORS, "classifier", classifier)
    log = LOG | {"metrics_extractor": "classifier"}
    model = {"conditioning": "class", "num_classes": 3}
    run = make_run(shards, tmp_path, log=log, model=make_run(shards, tmp_path).model.model_dump() | model)
    judge = opened(run)
    model_of_run = build_model(run.model)
    samples = judge.draw(model_of_run, Share())
    assert samples.logits is not None
    expected = (samples.logits.argmax(1) == judge.labels).double().mean()
    assert judge.judge(samples)["accuracy"].value == pytest.approx(float(expected))
    wrong = run.model_copy(update={"model": run.model.model_copy(update={"num_classes": 4})})
    with pytest.raises(ConfigError, match="the classifier knows 3 classes, the model has 4"):
        opened(wrong)


def test_what_cannot_be_judged_is_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^log.metrics_extractor inception needs log.metrics_weights: pt_inception"):
        opened(make_run(shards, tmp_path, log=LOG | {"metrics_extractor": "inception"}))


def test_the_plan_knows_the_network(tmp_path: Path) -> None:
    assert extractor_bytes(LogConfig()) == 0
    assert extractor_bytes(LogConfig(metrics_every=1)) > 2**24
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert extractor_bytes(LogConfig(metrics_every=1, metrics_weights=str(place))) == 5
