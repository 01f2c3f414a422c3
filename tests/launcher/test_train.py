"""Every way of starting a run reaches the same banner; errors are one line and an exit code."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.train import _ds_file, main
from sharpmoe.config_io import DEFAULT_DS_CONFIG, dump_run_config
from sharpmoe.errors import ConfigError
from tests.distributed import free_port
from tests.fixtures_data import make_shards
from tests.launcher.ranks import ranks_of
from tests.selection import selected, sweep
from tests.train.setting import make_run

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ZERO = "configs/zero3.json"
# name -> (words before launcher/train.py, words after it, environment, ranks)
FORMS: dict[str, tuple[list[str], list[str], dict[str, str], int]] = {
    "python": ([sys.executable], [], {}, 1),
    "torchrun": ([str(BIN / "torchrun"), "--nproc_per_node", "2"], ["--deepspeed", ZERO], {}, 2),
    "deepspeed": (
        [str(BIN / "deepspeed"), "--num_accelerators", "2"],
        ["--deepspeed", "--deepspeed_config", ZERO],
        {},
        2,
    ),
    "LOCAL_SIZE": ([str(BIN / "deepspeed")], ["--deepspeed", ZERO], {"LOCAL_SIZE": "2"}, 2),
    "error": ([sys.executable], ["--train.stepz", "3"], {}, 1),
}
Started = dict[str, "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Started]:
    """All forms at once: most of their time is spent in imports."""
    folder = tmp_path_factory.mktemp("launch")
    run = make_run(make_shards(folder / "shards"), folder, stage="pretrain", train={"micro_batch": None})
    (folder / "run.yaml").write_text(dump_run_config(run))
    names = [*selected(request, "name"), "error"]
    processes = {name: start(FORMS[name], folder / "run.yaml") for name in names}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def start(form: tuple[list[str], list[str], dict[str, str], int], config: Path) -> "subprocess.Popen[str]":
    before, after, extra, _ = form
    if "torchrun" in before[0]:
        before = [*before, "--master_port", str(free_port())]
    if "deepspeed" in before[0]:
        before = [*before, "--master_port", str(free_port())]
    words = [*before, "launcher/train.py", *after, "--config", str(config), "--dry-run"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | extra
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.dist
@pytest.mark.parametrize("name", sweep(["python", "torchrun", "deepspeed", "LOCAL_SIZE"], ["python", "deepspeed"]))
def test_every_form_reaches_the_same_banner(name: str, started: Started) -> None:
    out, err = started[name].communicate(timeout=120)
    ranks = FORMS[name][3]
    assert started[name].returncode == 0, err
    assert out.count(f"{ranks} rank(s) on cpu, ZeRO-3, fp32") == 1
    assert f"8 = {8 // ranks} per rank x 1 accumulation x {ranks} rank(s)" in out
    assert "M active per token" in out


@pytest.mark.dist
def test_an_error_is_one_line(started: Started) -> None:
    out, err = started["error"].communicate(timeout=120)
    assert started["error"].returncode == 2
    assert err == "error: --train.stepz: unknown key; did you mean train.steps?\n"
    assert out == ""


@pytest.mark.dist
def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    run = make_run(make_shards(tmp_path / "shards"), tmp_path, stage="pretrain", data={"train_split": "none"})
    (tmp_path / "run.yaml").write_text(dump_run_config(run))
    words = ["launcher/train.py", "--deepspeed", ZERO, "--config", str(tmp_path / "run.yaml")]
    with ranks_of(words, 2, tmp_path) as ranks:
        assert [rank.wait(120) for rank in ranks] == [2, 2]
    errors = [(tmp_path / f"err{rank}").read_text().splitlines() for rank in (0, 1)]
    assert errors[1] == []
    (line,) = errors[0]
    assert line.startswith("error: ")
    assert "no samples in split 'none'; it has train (20)" in line


FILE = Path("configs/zero2.json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], DEFAULT_DS_CONFIG),
        (["--deepspeed"], DEFAULT_DS_CONFIG),
        (["--deepspeed", str(FILE)], FILE),
        ([f"--deepspeed={FILE}"], FILE),
        (["--deepspeed", "--deepspeed_config", str(FILE)], FILE),
        (["--deepspeed_config", str(FILE)], FILE),
        (["--deepspeed", str(FILE), "--deepspeed_config", str(FILE)], FILE),
    ],
)
@pytest.mark.parametrize("rank", [[], ["--local_rank=1"], ["--local-rank", "1"]])
def test_every_way_to_name_the_deepspeed_file(words: list[str], expected: Path, rank: list[str]) -> None:
    arguments = main.parse([*rank, *words])
    assert _ds_file(arguments) == expected
    assert (arguments.config, arguments.overrides, arguments.dry_run) == (None, (), False)


def test_overrides_keep_their_order_among_the_options() -> None:
    words = ["--local_rank=0", "--optim.lr", "-1e-3", "--deepspeed", "--seed=1", "--config", "x.yaml", "--seed", "2"]
    arguments = main.parse([*words, "--dry-run"])
    assert arguments.overrides == ("--optim.lr", "-1e-3", "--seed=1", "--seed", "2")
    assert (arguments.config, arguments.dry_run) == (Path("x.yaml"), True)


def test_an_override_is_never_taken_for_an_abbreviated_option() -> None:
    assert main.parse(["--dry", "1"]).overrides == ("--dry", "1")


def test_two_different_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one DeepSpeed file"):
        _ds_file(main.parse(["--deepspeed", "a.json", "--deepspeed_config", "b.json"]))
