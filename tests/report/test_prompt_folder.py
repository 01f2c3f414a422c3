"""Pictures of prompts: the same however they are drawn, and drawn once."""

import json
from pathlib import Path

import pytest

from launcher.sample import main
from sharpmoe.report.prompt_folder import part_of_rank
from tests.report.run_folder import make_run_folder

PROMPTS = [{"tag": "colors", "prompt": f"a {colour} circle"} for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def words(run_folder: Path, root: Path, out: str, *more: str) -> list[str]:
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    fixed = ["--steps", "2", "--batch-size", "4", "--per-prompt", "2", "--device", "cpu"]
    return [str(run_folder), "--prompts", str(root / "p.jsonl"), *fixed, "--out", str(root / out), *more]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_call_goes_on_and_ranks_draw_what_one_process_draws(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(run_folder, tmp_path, "whole")) == 0
    whole = content(tmp_path / "whole")
    assert {f"{p:05}/samples/{k:04}.png" for p in range(3) for k in range(2)} <= whole.keys()
    assert {f"{p:05}/metadata.jsonl" for p in range(3)} <= whole.keys()
    assert len({whole[f"00000/samples/{k:04}.png"] for k in range(2)}) == 2
    (tmp_path / "whole" / "00002" / "samples" / "0001.png").unlink()  # of the second batch
    before = (tmp_path / "whole" / "00000" / "samples" / "0000.png").stat().st_mtime_ns
    assert main(words(run_folder, tmp_path, "whole")) == 0
    assert "going on after 1 of 2 batches" in capsys.readouterr().err
    assert content(tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "00000" / "samples" / "0000.png").stat().st_mtime_ns == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert part_of_rank() == (int(rank) + 1, 2)
        assert main(words(run_folder, tmp_path, "ranks")) == 0
    assert content(tmp_path / "ranks") == whole


def test_a_folder_holds_pictures_of_one_model(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(run_folder, tmp_path, "out", "--part", "1/2")) == 0
    assert main(words(run_folder, tmp_path, "out", "--weights", "live")) == 2
    assert "holds pictures of other weights, prompts or settings" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    assert main(words(run_folder, tmp_path, "mine")) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words(run_folder, tmp_path, "x")[:3]]) == 2
    assert "--prompts needs --out" in capsys.readouterr().err
