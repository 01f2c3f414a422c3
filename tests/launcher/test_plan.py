"""The plan of a run, as a person and as a program read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.plan import main
from tests.fixtures_data import make_unequal_shards
from tests.train.setting import make_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "configs" / "runs"
SMALL = [path for path in sorted((RUNS / "imagenet256").glob("*.yaml")) if "_s" in path.stem.removesuffix("_sharp")]
SHIPPED = [*sorted(RUNS.glob("posttrain-*.yaml")), *SMALL]

pytestmark = pytest.mark.slow  # each plan measures its model
WORDS = ("weights", "gradients", "optimizer", "EMA", "activations", "gathered", "peak", "reduce", "all-to-all")
TINY = ("--config", str(RUNS / "posttrain-counts.yaml"))


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str, code: int = 0) -> dict[str, Any]:
        assert main([*words, "--json"]) == code
        shown: dict[str, Any] = json.loads(capsys.readouterr().out)
        return shown

    return run


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_run_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert path.stem in shown
    assert "two_pass" in shown or "T = 1" in shown


def test_the_table_names_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--world", "4", "--ep", "2", "--micro-batch", "2", "--schedule", "two_pass"]) == 0
    shown = capsys.readouterr().out
    assert [word for word in (*WORDS, "x 4 accumulation") if word not in shown] == []
    assert shown.partition("-----\n")[2].startswith("  two_pass ")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("plain",), "plain"),
        (("checkpoint",), "checkpoint"),
        (("two_pass", "--rollout.merged_steps", "2"), "two_pass, merged_steps 2"),
        (("hybrid", "--kept-steps", "3"), "hybrid, kept_steps 3"),
        (("segments", "--segment-steps", "2"), "segments, segment_steps 2"),
        (("segments", "--segment-steps", "5", "--kept-steps", "0"), "segments, segment_steps 5, kept_steps 0"),
    ],
)
def test_every_schedule_can_be_asked_for(words: tuple[str, ...], name: str, plan: Any) -> None:
    shown = plan(*TINY, "--world", "4", "--schedule", *words)
    assert shown["schedules"][0]["schedule"] == name
    forms = {schedule["schedule"].partition(",")[0] for schedule in shown["schedules"]}
    assert forms == {"plain", "checkpoint", "two_pass", "hybrid", "segments"}
    sums = {schedule["schedule"]: schedule["memory"]["sums"] for schedule in shown["schedules"]}
    assert sums["plain"] == sums["checkpoint"] == 0  # one micro-batch, one backward
    assert sums["hybrid, kept_steps 5"] == 4 * shown["parameters"]
    assert {schedule["traffic"]["passes"] for schedule in shown["schedules"]} == {1.0}
    assert len({schedule["traffic"]["reductions"] for schedule in shown["schedules"]}) == 1


def test_the_largest_resolution_of_the_data_is_priced(plan: Any, tmp_path: Path) -> None:
    shards = make_unequal_shards(tmp_path / "shards")  # 16, 14 and 30 tokens
    run = make_run(shards, tmp_path, model={"latent_channels": 3})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True)))
    words = ("--config", str(file), "--world", "2", "--ep", "2", "--checkpoint.init", "base.safetensors")

    def cost(*more: str) -> tuple[int, int, int]:
        shown = plan(*words, *more)
        (own, *_) = shown["schedules"]
        return shown["tokens"], own["memory"]["activations"], own["traffic"]["exchanges"]

    largest = cost()
    assert largest[0] == 30
    assert largest == cost("--tokens", "30")
    smaller = cost("--tokens", "16")
    assert smaller[1] < largest[1]
    assert smaller[2] < largest[2]
    absent = cost("--data.shards", str(tmp_path / "not-there"))  # its texts are not known, so activations differ
    assert (absent[0], absent[2]) == (16, smaller[2])
    foreign = cost("--model.latent_size", "16")  # the data are of another model, so its own square counts
    assert foreign[0] == 64


def test_auto_is_resolved_and_reported(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(*TINY, "--world", "4", "--schedule", "auto")
    assert shown["schedules"][0]["schedule"] == "plain"
    assert shown["notes"][0].startswith("rollout.schedule: auto took plain (30 forwards' worth per micro-batch): ")
    room = next(s["memory"]["peak"] for s in shown["schedules"] if s["schedule"].startswith("hybrid"))
    less = plan(*TINY, "--world", "4", "--schedule", "auto", "--device-memory", str(1.001 * room / 0.9 / 2**30))
    assert less["schedules"][0]["schedule"] == "hybrid, kept_steps 5"
    assert main([*TINY, "--world", "4", "--schedule", "auto", "--device-memory", "0.01"]) == 1
    assert "the least there is, which does not fit" in capsys.readouterr().out


def test_experts_over_ranks_and_stages(plan: Any) -> None:
    one, two = (plan(*TINY, "--world", "4", "--ep", ep)["schedules"][0] for ep in ("1", "2"))
    assert one["memory"]["state"] == pytest.approx(two["memory"]["state"], rel=0.01)  # a part is a part
    assert two["memory"]["gathered"] < one["memory"]["gathered"]
    assert two["traffic"]["gathers"] < one["traffic"]["gathers"]
    assert (one["traffic"]["exchanges"], two["traffic"]["exchanges"] > 0) == (0, True)
    stage2 = plan(*TINY, "--world", "4", "--zero", "2")["schedules"][0]
    assert stage2["memory"]["weights"] == pytest.approx(4 * one["memory"]["weights"], rel=0.01)
    assert stage2["memory"]["gathered"] == 0
    assert stage2["traffic"]["reductions"] == pytest.approx(2 * one["traffic"]["reductions"], rel=0.01)


def test_one_rank_sends_nothing(plan: Any) -> None:
    assert {s["traffic"]["total"] for s in plan(*TINY, "--world", "1")["schedules"]} == {0}


def test_what_does_not_fit_is_reported_with_what_would(plan: Any) -> None:
    small = ("--world", "4", "--device-memory", "0.35", "--deepspeed")
    shown = plan(*TINY, *small, str(ROOT / "configs" / "zero3.json"), code=1)
    assert shown["warnings"][0].startswith("does not fit: ")
    assert "activations" in shown["warnings"][0]
    assert shown["would_fit"]
    assert all(other["memory"]["peak"] <= shown["usable_bytes"] for other in shown["would_fit"])
    sent = [other["traffic"]["total"] for other in shown["would_fit"]]
    assert sent == sorted(sent)


def test_a_model_above_the_limits_of_zero3_is_reported(plan: Any, tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_max_reuse_distance": 300_000, "stage3_prefetch_bucket_size": 0}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    shown = plan(*TINY, "--deepspeed", str(tmp_path / "zero.json"))
    assert shown["schedules"][0]["traffic"]["passes"] > 4
    assert any("stage3_max_reuse_distance" in warning for warning in shown["warnings"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--world", "64"), "train.global_batch is 32, which 64 ranks cannot share"),
        (("--world", "4", "--ep", "3"), "parallel.ep_size is 3, allowed: 1 | 2 | 4"),
        (("--config", "nowhere.yaml"), "run file nowhere.yaml does not exist"),
        (("--rollout.shedule", "plain"), "did you mean rollout.schedule?"),
        (("--train.frozen", "[moe.expert]"), "train.frozen: 'moe.expert' matches no parameter"),
        (("--train.frozen", "['*']"), "leaves nothing to train"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
