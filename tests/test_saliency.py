import math

import pytest
import torch

from sharpmoe.saliency import entropy_share, saliency_map, scale_for_entropy, token_mask


def test_a_flat_image_has_no_saliency_at_its_borders_either() -> None:
    assert saliency_map(torch.full((2, 3, 16, 16), -0.7), (4, 4)).abs().max() < 1e-6


def test_a_step_of_full_contrast_by_hand() -> None:
    image = -torch.ones(1, 3, 8, 8)
    image[..., 4:] = 1.0  # |Laplacian| is 1 in the two columns at the step, 0 elsewhere
    assert torch.allclose(saliency_map(image, (1, 1)), torch.tensor([[0.25]]))
    assert torch.allclose(saliency_map(image, (2, 4)), torch.tensor([[0.0, 0.5, 0.5, 0.0] * 2]))


def test_it_is_the_mean_over_channels_not_the_laplacian_of_the_mean() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, :, 4:], image[:, 1, :, 4:] = 1.0, -1.0  # the mean colour is flat
    assert saliency_map(image, (1, 1)).item() == pytest.approx(2 / 3 * 0.25 * 0.5)


def test_values_are_cut_at_one_and_are_row_major() -> None:
    image = torch.ones(1, 3, 4, 8)
    image[..., 2:, :4] = (torch.arange(2)[:, None] + torch.arange(4)) % 2 * 2.0 - 1.0  # a checkerboard, bottom left
    found = saliency_map(image, (2, 2))
    assert found.shape == (1, 4)
    assert found.max() == found[0, 2] == 1.0


def test_images_do_not_depend_on_their_batch() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(saliency_map(images, (4, 4))[1:2], saliency_map(images[1:2], (4, 4)))


def test_token_mask_is_the_share_of_foreground() -> None:
    alpha = torch.zeros(1, 1, 8, 8)
    alpha[..., :4, :6] = 1.0
    assert torch.equal(token_mask(alpha, (2, 2)), torch.tensor([[1.0, 0.5, 0.0, 0.0]]))


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3x3 token grid"):
        token_mask(torch.zeros(1, 1, 8, 8), (3, 3))


def test_the_entropy_of_two_tokens_by_hand() -> None:
    p = 1 / (1 + math.exp(-2.0 * 0.5))
    share = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert entropy_share([torch.tensor([[0.5, 0.0]])], 2.0) == pytest.approx(share, abs=1e-12)
    assert entropy_share([torch.tensor([[0.5, 0.0], [0.2, 0.2]])], 2.0) == pytest.approx((share + 1) / 2, abs=1e-12)


@pytest.mark.parametrize("share", [0.999, 0.9, 0.3])
def test_the_scale_gives_the_entropy_that_was_asked_for_on_any_grid(share: float) -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.rand(5, n, generator=g).square() / 3 for n in (4, 16, 63)]
    scale = scale_for_entropy(maps, share)
    assert entropy_share(maps, scale) == pytest.approx(share, abs=1e-5)
    assert scale_for_entropy([each / 2 for each in maps], share) == pytest.approx(2 * scale, rel=1e-5)


def test_flat_images_bound_the_entropy() -> None:
    maps = [torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.0, 0.1]])]
    assert entropy_share(maps, scale_for_entropy(maps, 0.6)) == pytest.approx(0.6, abs=1e-5)
    with pytest.raises(ValueError, match="less than 0.5 of log N"):
        scale_for_entropy(maps, 0.4)
