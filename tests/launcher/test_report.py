"""The page of a run, from the command line."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.read.shards import ShardSet
from launcher.report import main
from sharpmoe.evaluation.allocation import measure_allocation
from sharpmoe.evaluation.held_out import ALONE
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import load_model
from sharpmoe.report.figures import save_png
from sharpmoe.report.runs import find_saved_model
from sharpmoe.train.monitor import Monitor
from sharpmoe.train.runlog import RunLog
from tests.report.run_folder import make_run_folder
from tests.report.stored_run import write_run


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
def test_looking_at_a_run_leaves_pictures_figures_and_a_page(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = look_at(run_folder)
    names = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*.png")}
    expected = {f"{kind}/step{step:08}.png" for kind in ("samples", "routing") for step in (0, 1, 2)}
    assert expected | {"allocation/allocation.png"} <= names
    assert "change (paired)" in log.progress.stream.getvalue()
    assert list(read_log(run_folder / "log.jsonl")["validation/flow"]) == [1, 2]
    assert main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    assert not re.findall(r'src="(?!data:)', page)
    assert "samples, step 2" in page
    assert 'class="maprow"' in page
    shown = capsys.readouterr().out
    assert shown.startswith("toy\n")
    assert "rank correlation of experts per token with saliency M, all t" in shown
    assert main([str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run_folder / "report.json").read_text())


def test_a_copy_of_a_run_has_the_same_report(run_folder: Path, tmp_path: Path) -> None:
    """Copies have other times: those of cp and git are all new and in any order, those of rsync and tar may be old."""
    source = find_saved_model(run_folder)
    shards = ShardSet.open(source.run.data.shards, "unseen")
    measured = measure_allocation(load_model(source.weights)[0], shards, images=2)
    run = tmp_path / "toy"
    for name in ("after", "before", "middle10", "middle9"):
        measured.save(run / "allocation" / f"{name}.json")
    (run / "log.jsonl").write_text('{"run": "a", "step": 1, "loss/total": 1.0}\n')
    for name in ("step00000002", "step00000010", "step0000001"):
        save_png(np.zeros((4, 4, 3), np.uint8), run / "samples" / f"{name}.png")
    pages = set()
    for order in (1, -1):
        for number, path in enumerate(sorted(run.rglob("*.*"))[::order]):
            os.utime(path, (number, number))
        assert main([str(run)]) == 0
        pages.add((run / "report.html").read_text())
    (page,) = pages
    head = re.search(r"<thead><tr>((?:<th>[^<]*</th>)+)</tr></thead><tbody><tr><th scope=\"row\">rank", page)[1]
    assert re.findall(r"<th>([^<]*)</th>", head) == ["", "before", "middle9", "middle10", "after", "change"]
    assert re.findall(r"<figcaption>samples, step (\d+)", page) == ["1", "10", "2"]  # the ends, then between


def test_several_runs_are_one_page_beside_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, shift=shift)) for name, shift in (("a", 0.1), ("b", 0.3))]
    assert main(runs) == 0
    shown = capsys.readouterr()
    assert "b against a: compute moved to salient tokens: rank correlation +0.2" in shown.out
    assert shown.err == f"written: {tmp_path / 'report.html'} and report.json\n"
    assert main([*runs, "--out", str(tmp_path / "elsewhere" / "x.html")]) == 0
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"x.html", "x.json"}
    assert main([*runs, "--out", str(tmp_path)]) == 2


def test_a_report_needs_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
