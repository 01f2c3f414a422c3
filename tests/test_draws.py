"""Random draws depend on (seed, purpose, position) and on nothing else."""

import torch

from sharpmoe import draws


def test_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    together = draws.noise(3, range(10, 16), (2, 4))
    apart = torch.cat([draws.noise(3, [p], (2, 4)) for p in range(10, 16)])
    assert torch.equal(together, apart)
    assert torch.equal(draws.uniform_times(3, [7, 8], 5)[:, 1], draws.uniform_times(3, [8], 5)[:, 0])


def test_seed_purpose_and_position_each_change_the_draw() -> None:
    base = draws.noise(0, [0], (8,))
    others = (draws.noise(1, [0], (8,)), draws.noise(0, [1], (8,)))
    sampled = draws.noise(0, [0], (8,), draws.Purpose.SAMPLE_NOISE)
    assert all(not torch.equal(base, other) for other in (*others, sampled))


def test_noise_is_standard_normal_and_dropout_has_its_rate() -> None:
    x = draws.noise(0, range(400), (16, 4))
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    rate = draws.drop_caption(0, range(4000), 0.1).float().mean()
    assert 0.08 < rate < 0.12
    assert not draws.drop_caption(0, range(100), 0.0).any()


def test_blocks_are_drawn_evenly() -> None:
    counts = torch.bincount(torch.tensor([draws.rollout_block(0, step, 5) for step in range(2000)]))
    assert len(counts) == 5
    assert counts.min() > 300


def test_fresh_noise_begins_as_fixed_noise_and_depends_on_nothing_else() -> None:
    fresh = draws.fresh_noise(3, [7, 8], 5, (4, 6))
    assert fresh.shape == (5, 2, 4, 6)
    assert torch.equal(fresh[0], draws.noise(3, [7, 8], (4, 6)))
    assert torch.equal(fresh[:, 1:], draws.fresh_noise(3, [8], 5, (4, 6)))
    assert all(not torch.equal(fresh[0], later) for later in fresh[1:])
