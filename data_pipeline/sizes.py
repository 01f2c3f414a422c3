"""Sizes of images and latents."""

from sharpmoe.errors import DataError

ImageSize = int | tuple[int, int]  # pixels of a square, or (H, W)


def sides(image_size: ImageSize) -> tuple[int, int]:
    """(H, W)."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def divided(image_size: ImageSize, factor: int, codec: str) -> tuple[int, int]:
    """(H, W) / factor; DataError where that leaves a rest."""
    height, width = sides(image_size)
    if height % factor or width % factor:
        shown = f"{height}" if height == width else f"{height}x{width}"
        raise DataError(f"image size {shown}: codec {codec} needs a multiple of {factor}")
    return height // factor, width // factor
