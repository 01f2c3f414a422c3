"""What is drawn for a trajectory."""

from pathlib import Path

import torch

from sharpmoe.flow import markov_noise
from sharpmoe.train.trajectories import draw_trajectories
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
