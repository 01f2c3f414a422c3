"""What a finished run prints: figures, places that exist, commands that can be pasted."""

import importlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sharpmoe
from launcher.export import main as export
from launcher.main import _LAUNCHERS
from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.evaluation.validation import Validation
from sharpmoe.log_file import read_log
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.weights import save_weights
from sharpmoe.parallel.ranks import launch
from sharpmoe.train import loop
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.summary import _next_commands, _what_to_draw, closing_summary
from tests.fixtures_data import SHAPES, make_shards
from tests.model.nucleus_reference import reference
from tests.report.run_folder import make_run_folder
from tests.report.stored_run import write_run
from tests.toys import toy_model
from tests.train.setting import make_run, plan_for
from tests.train.test_runlog import stats

MEASURED = {"validate_every": 1}


def test_the_summary_names_figures_places_and_commands(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, checkpoint={"init": "assets/my base.safetensors"}, log=MEASURED)
    folder = tmp_path / "my run"
    log = RunLog(folder, 2, every=1, stream=io.StringIO())
    for step, mean in ((1, 0.25), (2, 0.5)):
        log.step(stats(step))
        log.validation(step, Validation({0.5: mean}, mean, 0.01, 4))
    log.close()
    (folder / "samples").mkdir()
    lines = closing_summary(run, folder, folder / "checkpoints" / "step00000002", log).splitlines()
    assert lines[0] == f"done: {folder}/checkpoints/step00000002"
    assert lines[1].startswith("  trained    2 step(s) in 0:00, 64.0 images/s")
    assert "not taken" not in lines[1]
    log.not_taken = 1
    taken = closing_summary(run, folder, folder / "checkpoints" / "step00000002", log).splitlines()[1]
    assert taken == f"{lines[1]}, 1 of them not taken (see faults/)"
    assert lines[2] == "  validation flow loss 0.5000 after step 2, best 0.2500 after step 1"
    text = "\n".join(lines)
    assert str(folder / "samples") in text
    assert "allocation" not in text  # there is none
    (folder / "allocation").mkdir()
    assert f"  allocation {folder}/allocation" in closing_summary(run, folder, folder / "checkpoints", log)
    commands = [line.strip() for line in lines[lines.index("next:") + 1 :]]
    assert f"python launcher/evaluate.py 'assets/my base.safetensors' '{folder}'" in commands
    assert f"tensorboard --logdir '{folder}'" in commands
    assert set(re.findall(r"launcher/(\w+)\.py", text)) <= set(_LAUNCHERS)


def test_the_best_checkpoint_of_a_run_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(
        make_shards(tmp_path / "shards"),
        tmp_path / "runs",
        train={"steps": 3},
        optim={"lr": 0.3, "ema_decay": 0.0},  # so that it gets worse
        checkpoint={"every": 1, "keep": 1, "keep_best": True},
        log={"every": 1, "validate_every": 1},
    )
    world = launch.start()
    try:
        folder = loop.train(plan_for(run, world), world).parent
    finally:
        launch.stop()
    losses = read_log(folder.parent / "log.jsonl")["validation/flow"]
    saved = {step: losses[step] for step in (1, 2, 3)}
    best = min(saved, key=lambda step: saved[step])
    assert best < 3
    assert sorted(path.name for path in folder.glob("step*")) == [f"step0000000{step}" for step in (best, 3)]
    assert (folder / "best").read_text() == f"step0000000{best}"
    assert f"  best       {folder}/step0000000{best} had the lowest held-out flow loss" in capsys.readouterr().out


def test_outside_a_checkout_the_commands_are_those_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, tmp_path, checkpoint={"init": "assets/base.safetensors"}, log=MEASURED)
    log = RunLog(tmp_path / "mine", 2, every=1, stream=io.StringIO())
    log.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sharpmoe"])
    text = closing_summary(run, Path("mine"), Path("mine", "checkpoints", "step00000002"), log)
    assert "launcher" not in text
    assert "  sharpmoe evaluate assets/base.safetensors mine\n  sharpmoe report mine\n" in text
    assert set(re.findall(r"sharpmoe (\w+)", text)) == {"sample", "evaluate", "report"} <= set(_LAUNCHERS)


@pytest.mark.parametrize(
    ("sections", "options"),
    [
        ({"model": {"conditioning": "text"}}, ' --captions "a red apple"'),
        ({"model": {"conditioning": "text"}, "sample": {"captions": ["a dog"]}}, ""),
        ({"model": {"conditioning": "class"}}, " --labels 0 1 2 3"),
        ({"model": {"conditioning": "class", "num_classes": 2}}, " --labels 0 1"),
        ({"model": {"conditioning": "class", "class_dropout": False}}, " --labels 0 1 2 3 --cfg-scale 1"),
        (
            {"model": {"conditioning": "class", "class_dropout": False}, "sample": {"cfg_scale": 1.0}},
            " --labels 0 1 2 3",
        ),
    ],
)
def test_the_command_for_samples_asks_for_what_the_model_can_draw(sections: dict[str, Any], options: str) -> None:
    assert _what_to_draw(RunConfig.model_validate(sections)) == options


def test_what_a_run_lacks_is_not_advised(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, checkpoint={"init": "base.safetensors"}, log={"trackers": []})
    names = [command.split()[1] for command in _next_commands(run, tmp_path)]
    assert names == ["launcher/sample.py", "launcher/report.py"]  # no held-out split, no event files


def _class_file(folder: Path) -> tuple[Backbone, str]:
    model = toy_model("ec", conditioning="class", num_classes=len(SHAPES), class_dropout=False)
    save_weights(folder / "my base.safetensors", model.state_dict(), model.config)
    return model, str(folder / "my base.safetensors")


def _own_folder(folder: Path) -> tuple[Backbone, str]:
    model = toy_model("diffmoe", text_width=32, pooled_width=32)
    save_weights(folder / "base.safetensors", model.state_dict(), model.config)
    assert export([str(folder / "base.safetensors"), str(folder / "my export"), "--to", "diffusers"]) == 0
    return model, str(folder / "my export")


def _published_folder(folder: Path) -> tuple[Backbone, str]:
    reference(joint_attention_dim=32).save_pretrained(folder / "their model")
    return sharpmoe.load_pretrained(folder / "their model", family="nucleus"), str(folder / "their model")


@pytest.mark.slow
@pytest.mark.parametrize("make_base", [_class_file, _own_folder, _published_folder])
def test_every_advised_command_works(
    make_base: Callable[[Path], tuple[Backbone, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a run may start from: each command is run as it is printed, in a folder of its own."""
    model, init = make_base(tmp_path)
    write_run(tmp_path / "runs" / "toy")  # its figures
    folder = make_run_folder(tmp_path / "runs", model, init)
    commands = _next_commands(load_run_config(folder / "config.yaml"), folder)
    monkeypatch.chdir(tmp_path)
    done = []
    for command in commands:
        words = shlex.split(command)
        if words[0] == "python":
            name = Path(words[1]).stem
            assert importlib.import_module(f"launcher.{name}").main(words[2:]) == 0, command
            done.append(name)
    assert done == ["sample", "evaluate", "report"]
    assert (folder / "samples" / "drawn" / "grid.png").is_file()
    assert {"before.json", "after.json"} <= {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert (folder / "report.html").is_file()
