"""A wheel works from any folder: its run files, base and batch-file templates come with it."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

from sharpmoe.shipped_files import SHIPPED_ROOT, find_shipped

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Installed(NamedTuple):
    wheel: Path
    python: Path

    def run(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(self.python), "-m", "launcher", *words]
        return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build a wheel of the tracked files; install it beside the packages of this environment, without the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / "clone" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(place), str(place / "clone")]
    subprocess.run(build, check=True)
    [wheel] = place.glob("*.whl")
    venv.create(place / "venv", with_pip=False)
    [packages] = place.glob("venv/lib/python*/site-packages")
    # A folder that a .pth file adds is not searched for .pth files, such as that of the editable checkout.
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)], check=True)
    return Installed(wheel, place / "venv" / "bin" / "python")


def test_the_wheel_holds_what_the_package_reads(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    for folder in ("configs", "assets"):
        kept = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert kept
        assert {f"sharpmoe/shipped/{path.relative_to(ROOT)}" for path in kept} <= names
    assert {f"launcher/slurm/{path.name}" for path in (ROOT / "launcher" / "slurm").glob("*.sbatch")} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "benchmarks", "data_pipeline", "launcher", "sharpmoe"
    }  # fmt: skip


def test_names_below_configs_mean_the_shipped_files_in_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    plan = installed.run(
        tmp_path, "plan", "--config", "configs/runs/quickstart.yaml", "--deepspeed", "configs/zero2.json"
    )
    assert plan.returncode == 0, plan.stderr
    assert "ZeRO-2" in plan.stdout
    batch = installed.run(tmp_path, "submit", "--config", "configs/runs/quickstart.yaml", "--no-check", "--dry-run")
    assert batch.returncode == 0, batch.stderr
    assert "#SBATCH" in batch.stdout
    missing = installed.run(tmp_path, "plan", "--config", "configs/runs/none.yaml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "configs/runs/none.yaml does not exist" in missing.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep
def test_quickstart_in_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    pictures, folder = tmp_path / "discs", tmp_path / "empty"
    for number in range(40):
        picture = Image.new("RGB", (64, 64), (number * 3, 200, number))
        ImageDraw.Draw(picture).ellipse((10 + number % 20, 10, 50, 50), fill=(255 - number * 3, number, 90))
        pictures.mkdir(exist_ok=True)
        picture.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a disc, number {number}")
    folder.mkdir()
    small = "train.steps=1 train.global_batch=4 rollout.num_steps=2 sample.num_steps=2 log.allocation_images=4"
    words = [f"--{each}" for each in (*small.split(), "log.validation_images=4", "sample.captions=[a disc, a box]")]
    done = installed.run(folder, "quickstart", "--source", str(pictures), *words)
    assert done.returncode == 0, done.stderr
    assert "Spearman, experts per token with saliency M" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["data", "runs"]
    assert (folder / "runs" / "discs" / "samples" / "drawn" / "grid.png").is_file()


def test_a_file_of_the_working_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/zero3.json") == SHIPPED_ROOT / "configs" / "zero3.json"
    assert find_shipped("zero3.json") == Path("zero3.json")
    assert find_shipped("configs/none.json") == Path("configs/none.json")
    Path("configs").mkdir()
    Path("configs/zero3.json").touch()
    assert find_shipped("configs/zero3.json") == Path("configs/zero3.json")
