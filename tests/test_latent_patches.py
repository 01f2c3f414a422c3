"""Latents as patches, with and without frames."""

import torch

from sharpmoe.latent_patches import patchify, unpatchify


def test_patches_of_frames_are_those_of_each_frame_in_turn() -> None:
    latent = torch.randn(2, 3, 4, 6, 8)  # B, C, T, H, W
    patches = patchify(latent, 2)
    assert patches.shape == (2, 4 * 3 * 4, 3 * 2 * 2)
    assert torch.equal(patches, torch.cat([patchify(latent[:, :, frame], 2) for frame in range(4)], dim=1))
    assert torch.equal(patchify(latent[:, :, :1], 2), patchify(latent[:, :, 0], 2))


def test_patches_of_frames_come_back() -> None:
    latent = torch.randn(2, 3, 4, 6, 8)
    features = patchify(latent, 2).unflatten(-1, (3, 4)).transpose(2, 3).flatten(2)  # (place, channel)
    assert torch.equal(unpatchify(features, 2, 3, (4, 3, 4)), latent)
    first = features[:, : 3 * 4]
    assert torch.equal(unpatchify(first, 2, 3, (1, 3, 4))[:, :, 0], unpatchify(first, 2, 3, (3, 4)))


def test_an_empty_batch_has_patches() -> None:
    assert patchify(torch.zeros(0, 3, 4, 6, 8), 2).shape == (0, 48, 12)
