import pytest
import torch

from sharpmoe.saliency import saliency_map, token_mask


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
