"""Container recipes, workflow, hooks and citation name what exists here."""

import re
from pathlib import Path

import pytest
import yaml

import sharpmoe

ROOT = Path(__file__).resolve().parents[2]


def parsed(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_the_own_check_runs() -> None:
    [job] = parsed(".github/workflows/ci.yaml")["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_hooks_are_commands_of_make_check() -> None:
    checks = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ncheck:")[1].split("\n\n")[0]
    [repository] = parsed(".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]:
        assert f"$(BIN)/{hook['entry'].replace(' --force-exclude', '').split()[0]}" in checks


def test_the_citation_is_of_this_version_and_licence() -> None:
    cited = parsed("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (sharpmoe.__version__, "Apache-2.0")


@pytest.mark.parametrize("name", ["Dockerfile", "sharpmoe.def"])
def test_a_container_installs_torch_first_and_the_pins(name: str) -> None:
    text = (ROOT / "containers" / name).read_text(encoding="utf-8")
    installs = re.findall(r"pip install --no-cache-dir (.*?)(?: \\)?$", text, re.MULTILINE)
    kinds = ("torch==", "pinned.txt", "requirements-nodeps.txt", "--no-deps .")
    assert len(installs) == len(kinds)
    assert [kind for kind, words in zip(kinds, installs, strict=True) if kind not in words] == []
    assert (ROOT / "requirements-nodeps.txt").is_file()
