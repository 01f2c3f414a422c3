"""Study files: what parts follow from them, and what is refused."""

from pathlib import Path

import pytest

from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.errors import ConfigError
from sharpmoe.model.trainable import check_trained, planned_model
from sharpmoe.study.plan import load_study, noisy_images_per_step
from tests.study.toy import make_study

STUDIES = sorted((PROJECT_ROOT / "configs" / "studies").glob("*.yaml"))


def test_parts_are_runs_that_differ_in_arm_and_seed_alone(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    assert [part.name for part in study.parts] == ["plain/seed0", "steered/seed0", "plain/seed1", "steered/seed1"]
    plain, steered = study.parts[:2]
    assert plain.run_folder == tmp_path / "studies" / "toy" / "arms" / "plain" / "seed0"
    assert (plain.run.loss.routing_weight, steered.run.loss.routing_weight) == (0.0, 0.5)
    assert steered.run.optim.lr_scale == {"saliency_router": 20}
    assert (study.parts[2].run.seed, study.parts[2].run.train.steps) == (1, 2)
    assert study.only(["steered"]) == (study.parts[1], study.parts[3])


def test_arms_of_other_stages_train_on_equally_many_noisy_images(tmp_path: Path) -> None:
    arms = [
        {"name": "plain"},
        {
            "name": "independent",
            "overrides": {
                "stage": "pretrain",
                "model": {"saliency_router": False},
                "train": {"global_batch": 16, "micro_batch": 8},
            },
        },
    ]
    study = load_study(make_study(tmp_path, arms=arms))
    assert [part.run.train.steps for part in study.parts] == [2, 3, 2, 3]
    assert {part.run.train.steps * noisy_images_per_step(part.run) for part in study.parts} == {48}


def test_overrides_of_the_command_line_reach_every_arm(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path), ["--optim.lr", "0.5"], name="other")
    assert {part.run.optim.lr for part in study.parts} == {0.5}
    assert study.folder == tmp_path / "studies" / "other"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"control": "plane"}, "control is 'plane', expected one of the arms: plain, steered"),
        ({"trained_images": 50}, "arm plain: trained_images is 50, no multiple of the 24 noisy images of a step"),
        ({"seeds": [0, 0]}, "seeds: expected one or more, each once, got 0, 0"),
        ({"armz": []}, "armz: Extra inputs are not permitted"),
        ({"evaluate": {"tuning": "unseen:3/2"}}, "split 'unseen:3/2': expected SPLIT or SPLIT:I/N"),
        ({"overrides": {"optim": {"lrr": 1}}}, "arm plain: .*optim.lrr: unknown key"),
        ({"control": "a", "arms": [{"name": "../a"}]}, "arms.0.name: String should match pattern"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, changes: dict[str, object], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown) as raised:
        load_study(make_study(tmp_path, **changes))
    assert "study.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_follows_from_the_study_cannot_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--train\.steps: a study sets this itself"):
        load_study(make_study(tmp_path), ["--train.steps", "5"])


def test_an_unknown_arm_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only steerd: no such arm; did you mean steered"):
        load_study(make_study(tmp_path)).only(["steerd"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load_and_train_equally(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    study = load_study(path)
    assert study.name == path.stem
    trained = [part.run for part in study.parts if part.arm.trained]
    assert {run.train.steps * noisy_images_per_step(run) for run in trained} == {study.trained_images}
    assert len({(run.train.steps, run.optim.lr, run.checkpoint.init) for run in trained}) == 1
    assert len(study.seeds) >= 3
    assert study.evaluate.tuning != study.evaluate.final


@pytest.mark.parametrize(
    "words", [[], ["--model.router", "ec"], ["--model.router", "tc", "--loss.routing_weight", "0"]], ids=" ".join
)
def test_every_arm_of_the_shipped_study_trains_in_every_family_that_it_names(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    study = load_study(Path("configs/studies/fashion.yaml"), words)
    for part in study.parts[: len(study.arms)]:  # of the first seed
        check_trained([name for name, _ in planned_model(part.run).named_parameters()], part.run)
