"""What is drawn for a trajectory."""

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sharpmoe.config import RunConfig
from sharpmoe.flow import markov_noise, shift_factor, shift_times
from sharpmoe.train import trajectories
from sharpmoe.train.trajectories import DrawnAhead, draw_trajectories
from tests.train.setting import ALONE, make_run, plan_for


def test_fresh_noise_changes_nothing_else_and_is_the_same_on_any_split_of_the_batch(
    shards: Path, tmp_path: Path
) -> None:
    fixed = make_run(shards, tmp_path)
    fresh = make_run(shards, tmp_path, rollout={"num_steps": 3, "noise": "fresh"})
    data = plan_for(fixed, ALONE).data
    batch = data.train.sources[0].batch([0, 1, 2, 3], [40, 41, 42, 43])
    late = data.train.sources[0].batch([2, 3], [42, 43])
    ours, theirs, part = (
        draw_trajectories([each], data.empty_text, run, torch.device("cpu"))[0]
        for each, run in ((batch, fresh), (batch, fixed), (late, fresh))
    )
    assert ours.x1.shape == (3, *theirs.x1.shape)
    assert torch.equal(ours.x1[0], theirs.x1)
    assert torch.equal(ours.x1[:, 2:], part.x1)
    assert torch.equal(ours.times, theirs.times)
    pretrain = make_run(shards, tmp_path, stage="pretrain", rollout={"noise": "fresh"})
    assert draw_trajectories([batch], data.empty_text, pretrain, torch.device("cpu"))[0].x1.ndim == 4


def test_markov_noise_follows_the_times_of_the_trajectory(shards: Path, tmp_path: Path) -> None:
    fresh, markov = (
        make_run(shards, tmp_path, rollout={"num_steps": 4, "noise": noise}) for noise in ("fresh", "markov")
    )
    data = plan_for(fresh, ALONE).data
    batch = data.train.sources[0].batch([0, 1, 2], [40, 41, 42])
    base, ours = (draw_trajectories([batch], data.empty_text, run, torch.device("cpu"))[0] for run in (fresh, markov))
    assert torch.equal(ours.times, base.times)
    assert torch.equal(ours.x1, markov_noise(base.x1, base.times))
    assert torch.equal(ours.x1[-1], base.x1[-1])
    assert not torch.equal(ours.x1[0], base.x1[0])


@pytest.mark.parametrize("stage", ["pretrain", "posttrain"])
def test_each_resolution_has_its_own_shift(stage: str, shards: Path, tmp_path: Path) -> None:
    shift = {"factor": "tokens", "base_tokens": 16, "max_tokens": 64}
    run, plain = (
        make_run(shards, tmp_path, stage=stage, rollout={"num_steps": 3, "shift": chosen}) for chosen in (shift, {})
    )
    data = plan_for(run, ALONE).data
    square = data.train.sources[0].batch([0, 1], [40, 41])
    wide = square._replace(latent=square.latent.repeat(1, 1, 1, 3))
    tokens = square.saliency.shape[1]
    assert run.rollout.shift.factor == "tokens"
    for batch, count in ((square, tokens), (wide, 3 * tokens)):
        times, unshifted = (
            draw_trajectories([batch], data.empty_text, each, torch.device("cpu"))[0].times for each in (run, plain)
        )
        scale = run.rollout.first_time if stage == "posttrain" else 1.0
        first = 1 if stage == "posttrain" else 0
        expected = shift_times(unshifted[first:] / scale, shift_factor(run.rollout.shift, count)) * scale
        torch.testing.assert_close(times[first:], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(times[:first], unshifted[:first])
        assert not torch.allclose(times[first:], unshifted[first:])


def test_pretraining_takes_logit_normal_times_or_uniform_ones(shards: Path, tmp_path: Path) -> None:
    runs = [make_run(shards, tmp_path, stage="pretrain", train={"times": name}) for name in ("logit_normal", "uniform")]
    data = plan_for(runs[0], ALONE).data
    rows = list(range(4)) * 250
    batch = data.train.sources[0].batch(rows, list(range(1000)))
    normal, uniform = (draw_trajectories([batch], data.empty_text, run, torch.device("cpu"))[0] for run in runs)
    assert torch.equal(uniform.x1, normal.x1)
    for item, quarter in ((normal, 0.139), (uniform, 0.25)):  # P(sigmoid(n) < 1/4) = P(n < -log 3)
        assert item.times.shape == (1, 1000)
        assert abs(float((item.times < 0.25).float().mean()) - quarter) < 0.04


@pytest.mark.parametrize("conditioning", ["text", "class"])
@pytest.mark.parametrize("noise", ["fixed", "markov"])
def test_the_host_does_not_wait_for_the_device(conditioning: str, noise: str, shards: Path, tmp_path: Path) -> None:
    """A tensor of the meta device has nothing that could be read."""
    model, rollout = {"conditioning": conditioning}, {"num_steps": 3, "noise": noise, "caption_dropout": 0.5}
    run = make_run(shards, tmp_path, model=model, rollout=rollout)
    data = plan_for(run, ALONE).data
    batch = data.train.sources[0].batch([0, 1, 2], [40, 41, 42])
    (there,), (here,) = (
        draw_trajectories([batch], data.empty_text, run, torch.device(device)) for device in ("meta", "cpu")
    )
    for sent, kept in zip(tree_leaves(there), tree_leaves(here), strict=True):
        assert (sent.device.type, sent.shape, sent.dtype) == ("meta", kept.shape, kept.dtype)


def test_numbers_that_are_drawn_ahead_are_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step; the fourth step is of wider images, which nobody knew, and the fifth like it."""
    run = make_run(shards, tmp_path, rollout={"num_steps": 3, "noise": "markov", "caption_dropout": 0.5})
    data, here = plan_for(run, ALONE).data, torch.device("cpu")
    numbers, draw, asked, drawers = DrawnAhead(run, 4), trajectories._draw_numbers, False, list[str]()

    def noted(run: RunConfig, keys: Sequence[Any]) -> list[Any]:
        if asked and threading.current_thread() is threading.main_thread():
            drawers.append(f"step {step}")
        return draw(run, keys)

    monkeypatch.setattr(trajectories, "_draw_numbers", noted)
    with closing(numbers):
        for step in range(5):
            batches = [
                data.train.sources[0].batch([0, 1], [4 * step + first, 4 * step + first + 1]) for first in (0, 2)
            ]
            if step >= 3:
                batches = [batch._replace(latent=batch.latent.repeat(1, 1, 1, 3)) for batch in batches]
            asked = True
            found = draw_trajectories(batches, data.empty_text, run, here, numbers)
            asked = False
            expected = draw_trajectories(batches, data.empty_text, run, here)
            assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))
    assert drawers == ["step 0", "step 3"], "the thread has drawn those of the others"
