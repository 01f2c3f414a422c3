"""Positions of frames."""

import pytest
import torch

from sharpmoe.model.embed import add_frame_positions, sincos_positions


def test_the_first_frame_has_the_positions_of_a_still_image_whatever_follows() -> None:
    still = sincos_positions(32, (4, 6), 4)
    assert torch.equal(add_frame_positions(still, 1), still)
    five, nine = (add_frame_positions(still, frames) for frames in (5, 9))
    assert five.shape == (1, 5 * 24, 32)
    assert torch.equal(five[:, :24], still)
    assert torch.equal(nine[:, : 5 * 24], five)  # more frames continue, they move none


@pytest.mark.parametrize("width", [24, 128])
def test_every_place_in_space_and_time_has_a_position_of_its_own(width: int) -> None:
    """No two of 16 frames of 8 x 8 tokens are nearer to each other than a tenth of two neighbours in space."""
    still = sincos_positions(width, (8, 8), 8)
    positions = add_frame_positions(still, 16)[0]
    apart = torch.cdist(positions, positions).fill_diagonal_(torch.inf)
    neighbours = torch.cdist(still[0, :1], still[0, 1:2])
    assert float(apart.min()) > 0.1 * float(neighbours)
    frames = positions.view(16, 64, width)
    steps = (frames[1:] - frames[:-1]).norm(dim=-1)
    assert float(steps.min()) > 0.5 * float(neighbours)  # the next frame is about as far as the next column
