"""The house stands: import contracts, launcher names, empty package files."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [ROOT / name for name in ("sharpmoe", "data_pipeline", "launcher")]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
LAUNCHERS = sorted(path.stem for path in (ROOT / "launcher").glob("*.py") if path.stem != "__init__")


def test_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_launcher_hides_a_module_that_others_import(name):
    """`deepspeed launcher/train.py` puts launcher/ first on sys.path."""
    assert name not in sys.stdlib_module_names
    assert name not in metadata.packages_distributions()


DOOR = ROOT / "sharpmoe" / "__init__.py"  # `sharpmoe.attach` and `sharpmoe.load_pretrained`, opened when asked for


@pytest.mark.slow
def test_asking_for_the_package_does_not_import_torch():
    code = "import sys, sharpmoe, sharpmoe.config; assert 'torch' not in sys.modules; sharpmoe.attach"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py" and path != DOOR], ids=str)
def test_package_files_hold_a_docstring_and_nothing_else(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]


BELOW_PARALLEL = [path for path in SOURCES if path.parts[-2] in ("sharpmoe", "model", "moe", "data_pipeline")]


@pytest.mark.parametrize("path", BELOW_PARALLEL, ids=lambda path: "/".join(path.parts[-2:]))
def test_below_parallel_nobody_asks_for_a_rank(path):
    assert "torch.distributed" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=str)
def test_every_folder_of_modules_is_a_package(folder):
    assert (folder / "__init__.py").is_file()
