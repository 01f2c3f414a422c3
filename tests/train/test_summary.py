"""What a finished run prints: figures, places that exist, commands that can be pasted."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.main import _LAUNCHERS
from sharpmoe.config import RunConfig
from sharpmoe.evaluation.validation import Validation
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.summary import _what_to_draw, closing_summary
from tests.train.setting import make_run
from tests.train.test_runlog import stats


def test_the_summary_names_figures_places_and_commands(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, checkpoint={"init": "assets/my base.safetensors"})
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


def test_outside_a_checkout_the_commands_are_those_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, tmp_path, checkpoint={"init": "assets/base.safetensors"})
    log = RunLog(tmp_path / "mine", 2, every=1, stream=io.StringIO())
    log.close()
    monkeypatch.chdir(tmp_path)
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
