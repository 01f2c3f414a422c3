"""The page of a run, from the command line."""

import io
import os
import re
from pathlib import Path

import pytest
import torch

from data_pipeline.read.shards import ShardSet
from launcher.report import main
from sharpmoe.evaluation.allocation import measure_allocation
from sharpmoe.evaluation.held_out import ALONE
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import load_model
from sharpmoe.report.page import _mean_curve
from sharpmoe.report.runs import find_saved_model
from sharpmoe.train.monitor import Monitor
from sharpmoe.train.runlog import RunLog
from tests.report.run_folder import make_run_folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def look_at(run_folder: Path) -> RunLog:
    """Do everything a run of two steps is looked at with."""
    source = find_saved_model(run_folder)
    run, (model, _) = source.run, load_model(source.weights)
    log = RunLog(run_folder, 2, stream=io.StringIO())
    held_out = ShardSet.open(run.data.shards, "unseen")
    monitor = Monitor.open(run, held_out, run_folder, torch.device("cpu"), ALONE, log)
    monitor.before_training(lambda: model)
    monitor.after_step(1, lambda: model)
    monitor.after_step(2, lambda: model)
    log.close()
    return log


@pytest.mark.slow
def test_looking_at_a_run_leaves_pictures_figures_and_a_page(run_folder: Path) -> None:
    log = look_at(run_folder)
    names = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*.png")}
    expected = {f"{kind}/step{step:08}.png" for kind in ("samples", "routing") for step in (0, 1, 2)}
    assert expected | {"allocation/allocation.png"} <= names
    assert "change (paired)" in log.progress.stream.getvalue()
    assert list(read_log(run_folder / "log.jsonl")["validation/flow"]) == [1, 2]
    assert main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    linked = re.findall(r'src="([^"]+\.png)"', page)
    assert set(linked) == expected
    assert all((run_folder / path).is_file() for path in linked)
    assert "change (paired)" in page


def test_a_copy_of_a_run_has_the_same_report(run_folder: Path, tmp_path: Path) -> None:
    """Copies have other times: those of cp and git are all new and in any order, those of rsync and tar may be old."""
    source = find_saved_model(run_folder)
    shards = ShardSet.open(source.run.data.shards, "unseen")
    measured = measure_allocation(load_model(source.weights)[0], shards, images=2)
    run = tmp_path / "toy"
    for name in ("after", "before", "middle10", "middle9"):
        measured.save(run / "allocation" / f"{name}.json")
    (run / "log.jsonl").write_text('{"run": "a", "step": 1, "loss/total": 1.0}\n')
    (run / "samples").mkdir()
    for name in ("step00000002", "step00000010", "step0000001"):
        (run / "samples" / f"{name}.png").touch()
    pages = set()
    for order in (1, -1):
        for number, path in enumerate(sorted(run.rglob("*.*"))[::order]):
            os.utime(path, (number, number))
        assert main([str(run)]) == 0
        pages.add((run / "report.html").read_text())
    (page,) = pages
    head = next(line for line in page.splitlines() if "middle9" in line)
    assert head.split() == ["before", "middle9", "middle10", "after"]
    assert re.findall(r"step(\d+)\.png", page) == ["00000010", "00000002", "0000001"]


def test_a_page_begins_with_a_summary_and_groups_its_curves(tmp_path: Path) -> None:
    start = '{"event": "start", "run": "a", "step": 0, "time": "T", "settings": {"train.steps": 9, "world": 2}}\n'
    figures = '"loss/total": 2.0, "optim/lr": 1.0, "optim/grad_norm": 1.0, "x_t/layer0": 1.0, "x_t/layer1": 2.0'
    (tmp_path / "log.jsonl").write_text(start + f'{{"run": "a", "step": 1, {figures}}}\n')
    (tmp_path / "samples").mkdir()
    for step in range(4):
        (tmp_path / "samples" / f"step{step:08}.png").touch()
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport"' in page
    assert "<td>steps<td>1 of 9" in page
    assert "<td>loss<td>2 (step 1) to 2 (step 1)" in page
    assert re.findall(r'alt="([^"]+)"', page) == [
        *("samples, step 3", "samples, step 2", "samples, step 1", "samples, step 0"),
        *("loss", "optim/lr", "optim/grad_norm", "x_t"),
    ]
    assert "<summary>2 between</summary>" in page


def test_a_page_shows_warnings_and_how_strong_the_saliency_routers_are(tmp_path: Path) -> None:
    spread = '"saliency_spread_t>0.65/layer0": 0.1, "saliency_spread_t>0.65/layer1": 0.3'
    warning = '{"event": "warning", "run": "a", "step": 1, "text": "note: inert <"}\n'
    (tmp_path / "log.jsonl").write_text(f'{{"run": "a", "step": 1, {spread}}}\n{warning}{warning}')
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>warnings<td>note: inert &lt;</table>" in page
    assert 'alt="spread of their logits over that of the gates&#x27;"' in page
    assert _mean_curve([{1: 0.1, 2: 1.0}, {1: 0.3}]) == {1: 0.2}


def test_a_report_needs_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
