"""A batch of prepared samples: what the model is trained on."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Prepared samples, ready for the model. B images or clips, N tokens of each, L text tokens.

    A NamedTuple of tensors (not a dataclass), because DeepSpeed's ZeRO-3 hooks look for tensors only inside tuples,
    lists and dicts.
    """

    latent: Tensor  # (B, C, H, W), of frames (B, C, T, H, W), float32, scaled by the codec to about unit variance
    text: Tensor  # (B, L, D_text) token states of the caption as they are stored (float16, bfloat16 or float32)
    text_mask: Tensor  # (B, L) bool, True where a text token is real
    pooled: Tensor  # (B, D_pooled) float32; D_pooled is 0 where the encoder does not pool
    label: Tensor  # (B,) int64, -1 where the sample has no class
    saliency: Tensor  # (B, N) float32 in [0, 1]: the map M of the clean image on the token grid, row-major, by frame
    foreground: Tensor  # (B, N) float32 in [0, 1]: alpha on the token grid; NaN where the image has no alpha
    position: Tensor  # (B,) int64: index of the sample in the order of the run; keys all random draws
    keys: tuple[str, ...]  # B sample keys
    captions: tuple[str, ...]  # B captions
