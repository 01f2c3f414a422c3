"""Result files as the tools of GenEval and DPG-bench write them."""

import json
from pathlib import Path

import pytest

from launcher.evaluate import main
from sharpmoe.errors import DataError
from sharpmoe.evaluation.benchmarks import read_result

DPG = (
    "a/0.png, 0.5, 1.0, 0.75\na/1.png, 0.25, 0.25, 0.25\nModel: a\n"
    "L1 category scores:\n\tentity: 60.0\n\tglobal: 40.0\n"
    "L2 category scores:\n\tentity - whole: 60.0\nImage path: a\nSave results to: r.txt\nDPG-Bench score: 50.0\n"
)


def geneval(path: Path, correct: dict[str, list[bool]]) -> Path:
    lines = [
        json.dumps({"filename": "x", "tag": tag, "prompt": "p", "correct": hit, "metadata": "{}"})
        for tag, hits in correct.items()
        for hit in hits
    ]
    path.write_text("\n".join(lines))
    return path


def test_geneval_is_the_mean_of_its_tasks(tmp_path: Path) -> None:
    path = geneval(tmp_path / "r.jsonl", {"single_object": [True] * 4, "counting": [True, False]})
    found = read_result("geneval", path)
    assert {name: figure.value for name, figure in found.figures.items()} == {
        "single_object": 1.0,
        "counting": 0.5,
        "overall": 0.75,  # not 5/6, the share of images
    }
    assert found.figures["overall"].error == pytest.approx(0.5 * (0.25 / 2) ** 0.5)
    assert found.protocol["name"] == "GenEval of 6 images, not 2212, mean of 2 tasks"


def test_dpg_has_its_categories_and_the_spread_of_its_prompts(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text(DPG)
    found = read_result("dpg", tmp_path / "r.txt")
    assert {name: figure.value for name, figure in found.figures.items()} == {
        "entity": 60.0,
        "global": 40.0,
        "overall": 50.0,
    }
    assert found.figures["overall"].error == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("benchmark", "content", "message"),
    [
        ("geneval", "", "holds no results"),
        ("geneval", '{"tag": "a"}', "no result of GenEval's"),
        ("geneval", "no json", "no result of GenEval's"),
        ("geneval", '{"tag": "a", "correct": "False"}', "correct is 'False', expected true or false"),
        ("dpg", DPG.replace("score: 50", "score: 5.5.5"), "no result of DPG-bench's"),
        ("dpg", DPG.partition("Model")[0], "expected the results.txt of a finished"),
        ("dpg", DPG.replace("score: 50", "score: 60"), "the mean of its 2 prompts is 50.00, its score 60.0"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, benchmark: str, content: str, message: str) -> None:
    (tmp_path / "r").write_text(content)
    with pytest.raises(DataError, match=message):
        read_result(benchmark, tmp_path / "r")


def test_the_command_shows_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name, hits in (("a", [True, True]), ("b", [False, True])):
        (tmp_path / name).mkdir()
        paths.append(str(geneval(tmp_path / name / "results.jsonl", {"colors": hits})))
    assert main([*paths, "--benchmark", "geneval", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["a/results", "b/results"]
    assert json.loads((tmp_path / "out" / "b-results.figures.json").read_text())["figures"]["overall"]["value"] == 0.5
    assert main([*paths, "--benchmark", "geneval", "--names", "a", "a", "--out", str(tmp_path / "out")]) == 2
