"""A codec without a pretrained network: the principal components of patches."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.encode.codecs import CachedLatent, ImageSize, Posterior, divided
from data_pipeline.identity import Identity
from sharpmoe.errors import DataError


class PatchPCA:
    """PCA over patch x patch RGB patches: a latent without a pretrained network.

    z = gain * scale * basis (patch - mean) with scale = std ** -whiten per channel and one gain for unit variance over
    all channels. whiten 0 keeps the spread of the principal components (the first dominates), 1 makes all equal (fine
    detail weighs as much as layout). docs/design/0002-latents.md has the figures.
    """

    def __init__(self, patch: int, whiten: float, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        """`mean` (3 patch^2,), `basis` (C, 3 patch^2) orthonormal rows, `scale` (C,) with the gain; all float32."""
        self.patch, self.whiten = patch, whiten
        self.mean, self.basis, self.scale = mean, basis, scale

    @classmethod
    def fit(cls, batches: Iterable[Tensor], patch: int = 4, channels: int = 16, whiten: float = 0.5) -> "PatchPCA":
        """Fit in one pass over (B, 3, H, W) batches; float64 sums, so any number of images in constant memory.

        Raises DataError for settings outside their range, and where there is no image.
        """
        width = 3 * patch * patch
        if not 1 <= channels <= width:
            raise DataError(f"pca channels {channels}: expected 1 to {width} for {patch}x{patch} patches")
        if not 0 <= whiten <= 1:
            raise DataError(f"pca whiten {whiten}: expected 0 (keep the spread of the components) to 1 (equal spread)")
        count, total = 0, torch.zeros(width, dtype=torch.float64)
        outer = torch.zeros(width, width, dtype=torch.float64)
        for images in batches:
            divided((images.shape[-2], images.shape[-1]), patch, "patch_pca")
            rows = functional.pixel_unshuffle(images, patch).movedim(1, -1).reshape(-1, width).double()
            count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
        if count == 0:
            raise DataError(
                "the training split has no readable image to fit the patch PCA on; add images or captions outside of "
                "val/ and test/, which are held out"
            )
        mean = total / count
        variances, vectors = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
        basis = vectors.flip(1).T[:channels]
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        basis = basis * largest.sign()  # an eigenvector's sign is arbitrary: fix it, so that two fits agree
        std = variances.flip(0)[:channels].clamp_min(1e-8).sqrt()
        scale = std**-whiten
        gain = ((std * scale) ** 2).mean().rsqrt()
        return cls(patch, whiten, mean.float(), basis.float().contiguous(), (scale * gain).float())

    @property
    def identity(self) -> Identity:
        """Settings and a hash of the fitted arrays."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.numpy().tobytes())
        return {
            "kind": "patch_pca",
            "patch": self.patch,
            "channels": len(self.basis),
            "whiten": self.whiten,
            "sha256": digest.hexdigest(),
        }

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (channels, H / patch, W / patch)."""
        return len(self.basis), *divided(image_size, self.patch, "patch_pca")

    def encode(self, images: Tensor) -> Tensor:
        """Project every patch: (B, 3, H, W) -> (B, C, H / patch, W / patch)."""
        patches = functional.pixel_unshuffle(images, self.patch) - self._at(images, self.mean)
        return torch.einsum("cp,bphw->bchw", self.basis.to(images), patches) * self._at(images, self.scale)

    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        return Posterior(self.encode(images), None)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the least-squares image of the kept components."""
        components = latents.float() / self._at(latents, self.scale)
        patches = torch.einsum("cp,bchw->bphw", self.basis.to(latents.device), components)
        return functional.pixel_shuffle(patches + self._at(latents, self.mean), self.patch).clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted arrays."""
        return {"basis": self.basis, "mean": self.mean, "scale": self.scale}

    @staticmethod
    def _at(like: Tensor, vector: Tensor) -> Tensor:
        return vector.to(like.device)[:, None, None]
