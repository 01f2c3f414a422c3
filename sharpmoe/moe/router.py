"""Logits of one MoE layer: the pretrained gate plus SharpMoE's saliency router. Computed in float32 or better."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


def linear32(x: Tensor, layer: nn.Linear) -> Tensor:
    """Apply `layer` to x with input and parameters in float32 or better: routing flips on half-precision ties."""
    bias = None if layer.bias is None else at_least_float32(layer.bias)
    return functional.linear(at_least_float32(x), at_least_float32(layer.weight), bias)


class Linear32(nn.Linear):
    """A linear layer that computes in float32 whatever its stored dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out) float32 (float64 in, float64 out)."""
        return linear32(input, self)


class SaliencyRouter(nn.Module):
    """Two-layer MLP D -> D -> E on the embedded guidance latent (SharpMoE section 3.1); its output starts at zero.

    With the output layer at zero its logits are exactly 0, so a freshly attached router leaves the model bit-identical.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = Linear32(width, width)
        self.out = Linear32(width, num_experts)

    def forward(self, guidance_tokens: Tensor) -> Tensor:
        """Map guidance tokens (B, N, D) to saliency logits (B, N, E) float32."""
        logits: Tensor = self.out(functional.silu(self.hidden(guidance_tokens)))
        return logits
