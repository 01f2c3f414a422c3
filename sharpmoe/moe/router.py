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


class PrototypeGate(Linear32):
    """Cosine of a token to one learned centre per expert (ProMoE's prototypical routing, arXiv 2510.24711)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__(width, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens (..., D) to cosines (..., E) float32."""
        tokens, centres = at_least_float32(input), at_least_float32(self.weight)
        return functional.linear(functional.normalize(tokens, dim=-1), functional.normalize(centres, dim=-1))


class MlpGate(nn.Module):
    """Two-layer GELU gate D -> D -> E, whose hidden layer may also feed the layer's own prediction of the target.

    Expert Race (arXiv 2503.16057), section 6: the head shares the first layer with the router.
    """

    def __init__(self, width: int, num_experts: int, prediction_width: int) -> None:
        super().__init__()
        self.hidden = Linear32(width, width)
        self.out = Linear32(width, num_experts)
        self.head = Linear32(width, prediction_width) if prediction_width else None

    def forward(self, h: Tensor) -> Tensor:
        """Map tokens (B, N, D) to logits (B, N, E) float32."""
        logits: Tensor = self.out(functional.gelu(self.hidden(h)))
        return logits

    def predict(self, h: Tensor) -> Tensor | None:
        """Predict the target of tokens (B, N, D): (B, N, p p C) float32, or None without a head."""
        return None if self.head is None else self.head(functional.gelu(self.hidden(h)))


def make_gate(kind: str, width: int, num_experts: int, prediction_width: int) -> nn.Module:
    """Build the pretrained part of a router: linear, prototypes or mlp."""
    if kind == "prototypes":
        return PrototypeGate(width, num_experts)
    if kind == "mlp":
        return MlpGate(width, num_experts, prediction_width)
    return Linear32(width, num_experts, bias=False)


class SaliencyRouter(nn.Module):
    """Two-layer MLP D -> D -> E on the embedded x0_prev (SharpMoE section 3.1); its output starts at zero.

    With the output layer at zero its logits are exactly 0, so a freshly attached router leaves the model bit-identical.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = Linear32(width, width)
        self.out = Linear32(width, num_experts)

    def forward(self, x0_prev_tokens: Tensor) -> Tensor:
        """Map x0_prev tokens (B, N, D) to saliency logits (B, N, E) float32."""
        logits: Tensor = self.out(functional.silu(self.hidden(x0_prev_tokens)))
        return logits
