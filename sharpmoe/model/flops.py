"""The matrix products of one call of the model, counted from the configuration, the tokens and the routing taken.

A product (m, k) x (k, n) is 2 m k n floating point operations. Everything else (norms, activations, softmax, gathers,
losses, optimizer) is not counted, as is usual for utilisation.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sharpmoe.config import ModelConfig
from sharpmoe.model.embed import FREQUENCIES

_Part = Literal["dense", "routed", "router"]
_Use = Literal["attention", "mlp", "other"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model."""

    images: int = 1
    tokens: int  # per image
    rows: float = 0  # rows that the routed experts computed, over all MoE layers; a mean need not be whole
    text_tokens: int = 0  # per image, padding included; class-conditional models have none
    uses_x0_prev: bool = False  # given x0_prev, the clean latent predicted by the previous step
    training: bool = True  # some families have products for their losses only
    for_losses: bool = True  # in training: with these products
    steering: bool = False  # with for_losses: a loss trains the saliency routers alone, which are run once more for it

    @property
    def has_losses(self) -> bool:
        """Whether products that only losses need are made."""
        return self.training and self.for_losses


class Product(NamedTuple):
    """Matrix products (m, k) x (k, n), `batch` at a time, that a forward has `times` times."""

    part: _Part
    times: int
    m: float
    k: int
    n: int
    batch: int = 1
    gradients: int = 2  # products of its backward: one less where a factor needs no gradient
    in_block: bool = True  # computed again where blocks are recomputed
    layers: tuple[str, ...] = ()  # the linear layers, by their names in a block or, outside of blocks, in the model
    frozen_gradients: int = 1  # of `gradients`, those that stay where nothing but adapters in blocks is trained
    use: _Use = "other"  # of a dense product

    @property
    def forward(self) -> float:
        return 2 * self.times * self.batch * self.m * self.k * self.n

    @property
    def backward(self) -> float:
        return self.forward * self.gradients


class Flops(NamedTuple):
    """FLOPs by their use."""

    dense: float  # what every token costs: embedders, attention, dense and shared MLPs, modulation, final layer
    routed: float  # routed experts, on their rows
    router: float  # gates, saliency routers with the x0_prev they read, capacity predictors, heads for router losses

    @property
    def total(self) -> float:
        return sum(self)


def forward_flops(products: Iterable[Product]) -> Flops:
    """Return the FLOPs of a forward."""
    return _by_part((product.part, product.forward) for product in products)


def backward_flops(products: Iterable[Product]) -> Flops:
    """Return the FLOPs of a backward: twice the forward, except for inputs without gradient (patches, times, texts)."""
    return _by_part((product.part, product.backward) for product in products)


def _by_part(booked: Iterable[tuple[_Part, float]]) -> Flops:
    sums: dict[_Part, float] = {"dense": 0, "routed": 0, "router": 0}
    for part, flops in booked:
        sums[part] += flops
    return Flops(**sums)


def products(config: ModelConfig, call: Call) -> list[Product]:
    """All matrix products of a call's forward."""
    dense_blocks = config.depth - config.num_moe_layers
    trunk = _TRUNKS[config.backbone]
    every_block, moe = list(trunk.block(config, call)), list(_moe(config, call))
    mlp = list(_feed_forward(config, call, "mlp", config.mlp, config.mlp_width))
    repeated = [(every_block, config.depth), (mlp, dense_blocks), (moe, config.num_moe_layers)]
    blocks = [each._replace(times=each.times * depth) for group, depth in repeated for each in group]
    return [*trunk.outside(config, call), *blocks, *_experts(config, call)]


def with_adapters(done: Iterable[Product], adapted: Iterable[str], rank: int, others_trained: bool) -> list[Product]:
    """Return products of a forward with those of low-rank adapters: A x, (m, k) x (k, rank), and B (A x).

    adapted: names in the model of the adapted layers' weights. others_trained: whether the run trains more than
    adapters; otherwise weights have no gradient. Image tokens count as having one in every block, the first included;
    conditions, texts and x0_prev have none, unless there are adapters on their way: then all count as having one.
    """
    names = [name.removesuffix(".weight") for name in adapted]
    counts = Counter(re.sub(r"^blocks\.\d+\.", "", name) for name in names)
    inputs_trained = any(
        name.endswith("text_proj") or not name.startswith(("blocks.", "final_layer.")) for name in names
    )
    found = list[Product]()
    for product in done:
        inputs = product.gradients - 1 if inputs_trained or others_trained else product.frozen_gradients
        kept = product.gradients if others_trained else max(product.frozen_gradients, inputs)
        found.append(product._replace(gradients=kept))
        for layer in product.layers:
            down = product._replace(times=counts[layer], n=rank, gradients=1 + inputs, layers=())
            found += [down, down._replace(k=rank, n=product.n, gradients=2 * min(1, product.gradients))]
    return found


def _patches(config: ModelConfig, call: Call) -> Iterator[Product]:
    """Embed x_t and x0_prev."""
    tokens, patch = call.images * call.tokens, config.latent_channels * config.patch_size**2
    layers = ("x_embedder.proj",)
    yield Product(
        "dense", 1, tokens, patch, config.width, gradients=1, in_block=False, layers=layers, frozen_gradients=0
    )
    if call.uses_x0_prev:
        read = config.saliency_router and config.num_moe_layers > 0
        yield Product(
            "router",
            1,
            tokens,
            patch,
            config.width,
            gradients=int(read),
            in_block=False,
            layers=layers,
            frozen_gradients=0,
        )


def _outside_dit(config: ModelConfig, call: Call) -> Iterator[Product]:
    """Embedders and final layer."""
    width, images = config.width, call.images
    patch = config.latent_channels * config.patch_size**2
    yield from _patches(config, call)
    embedders = [("t_embedder.mlp", images, FREQUENCIES)]
    if config.conditioning == "text":
        embedders += [
            ("text_embedder.tokens", images * call.text_tokens, config.text_width),
            ("text_embedder.pooled", images, config.pooled_width),
        ]
    for name, m, k in embedders:
        yield from _embedder(name, m, k, width, width)
    yield from _final_layer(config, call, patch * (2 if config.learn_sigma else 1))


def _embedder(name: str, m: int, k: int, hidden: int, n: int) -> Iterator[Product]:
    """Two layers with an activation between them, of inputs without gradient."""
    first, last = (f"{name}.0",), (f"{name}.2",)
    yield Product("dense", 1, m, k, hidden, gradients=1, in_block=False, layers=first, frozen_gradients=0)
    yield Product("dense", 1, m, hidden, n, in_block=False, layers=last, frozen_gradients=0)


def _final_layer(config: ModelConfig, call: Call, patch: int) -> Iterator[Product]:
    width, modulation = config.width, ("final_layer.modulation",)
    yield Product("dense", 1, call.images, width, 2 * width, in_block=False, layers=modulation, frozen_gradients=0)
    yield Product("dense", 1, call.images * call.tokens, width, patch, in_block=False, layers=("final_layer.linear",))


def _block_of_dit(config: ModelConfig, call: Call) -> Iterator[Product]:
    """What every block has: modulation, attention, attention to text."""
    width, tokens = config.width, call.images * call.tokens
    yield Product("dense", 1, call.images, width, 6 * width, layers=("modulation",), frozen_gradients=0)
    yield Product("dense", 1, tokens, width, 3 * width, layers=("attn.qkv",), use="attention")
    yield from _attention(config, call, call.tokens)
    yield Product("dense", 1, tokens, width, width, layers=("attn.proj",), use="attention")
    if config.conditioning == "text":
        yield Product("dense", 2, tokens, width, width, layers=("cross_attn.q", "cross_attn.proj"), use="attention")
        text = call.images * call.text_tokens
        yield Product(
            "dense", 1, text, width, 2 * width, layers=("cross_attn.kv",), frozen_gradients=0, use="attention"
        )
        yield from _attention(config, call, call.text_tokens)


def _outside_nucleus(config: ModelConfig, call: Call) -> Iterator[Product]:
    """Embedders and final layer."""
    yield from _patches(config, call)
    yield from _embedder("t_embedder.mlp", call.images, config.width, 4 * config.width, config.width)
    yield from _final_layer(config, call, config.latent_channels * config.patch_size**2)


def _block_of_nucleus(config: ModelConfig, call: Call) -> Iterator[Product]:
    """What every block has: modulation, the projection of the text, attention to image and text together."""
    width, tokens, text = config.width, call.images * call.tokens, call.images * call.text_tokens
    shared = width // config.num_heads * config.kv_heads  # width of keys, and of values
    yield Product("dense", 1, call.images, width, 4 * width, layers=("modulation",), frozen_gradients=0)
    yield Product(
        "dense", 1, text, config.text_width, width, layers=("text_proj",), frozen_gradients=0, use="attention"
    )
    yield Product(
        "dense", 2, text, width, shared, layers=("attn.text_k", "attn.text_v"), frozen_gradients=0, use="attention"
    )
    yield Product("dense", 2, tokens, width, width, layers=("attn.q", "attn.proj"), use="attention")
    yield Product("dense", 2, tokens, width, shared, layers=("attn.k", "attn.v"), use="attention")
    yield from _attention(config, call, call.tokens + call.text_tokens)


class _Trunk(NamedTuple):
    """The products of a backbone beside its feed-forward networks."""

    outside: Callable[[ModelConfig, Call], Iterator[Product]]  # of the blocks
    block: Callable[[ModelConfig, Call], Iterator[Product]]  # of each


_TRUNKS = {  # by backbone
    "dit": _Trunk(_outside_dit, _block_of_dit),
    "nucleus": _Trunk(_outside_nucleus, _block_of_nucleus),
}


def _attention(config: ModelConfig, call: Call, keys: int) -> Iterator[Product]:
    heads, head_width = call.images * config.num_heads, config.width // config.num_heads
    yield Product("dense", 1, call.tokens, head_width, keys, batch=heads, frozen_gradients=2, use="attention")
    yield Product("dense", 1, call.tokens, keys, head_width, batch=heads, frozen_gradients=2, use="attention")


def _feed_forward(config: ModelConfig, call: Call, name: str, kind: str, hidden: int) -> Iterator[Product]:
    """A feed-forward network that every token goes through."""
    if kind in ("identity", "none"):
        return
    tokens = call.images * call.tokens
    *first, last = ("gate_proj", "up_proj", "down_proj") if kind == "swiglu" else ("fc1", "fc2")
    yield Product(
        "dense", len(first), tokens, config.width, hidden, layers=tuple(f"{name}.{each}" for each in first), use="mlp"
    )
    yield Product("dense", 1, tokens, hidden, config.width, layers=(f"{name}.{last}",), use="mlp")


def _moe(config: ModelConfig, call: Call) -> Iterator[Product]:
    """What an MoE layer computes for every token."""
    yield from _gate(config, call)
    width, experts, tokens = config.width, config.num_experts, call.images * call.tokens
    if call.uses_x0_prev and config.saliency_router:
        yield Product("router", 1, tokens, width, width, frozen_gradients=0)
        yield Product("router", 1, tokens, width, experts, frozen_gradients=0)
        if call.has_losses and call.steering:
            yield Product("router", 1, tokens, width, width, gradients=1, frozen_gradients=0)
            yield Product("router", 1, tokens, width, experts, frozen_gradients=0)
    if config.family.thresholds == "predicted" and (call.has_losses or not call.training):
        yield Product("router", 1, tokens, config.gate_width, width, gradients=1, frozen_gradients=0)
        yield Product("router", 1, tokens, width, experts, frozen_gradients=0)
    yield from _feed_forward(config, call, "moe.shared", config.shared, config.shared_width)


def _gate(config: ModelConfig, call: Call) -> Iterator[Product]:
    width, experts, tokens, read = config.width, config.num_experts, call.images * call.tokens, config.gate_width
    if config.gate == "mlp":
        yield Product("router", 1, tokens, read, width)
    yield Product("router", 1, tokens, width if config.gate == "mlp" else read, experts)
    if config.gate == "prototypes" and call.has_losses:  # what the contrast compares: choices have no gradient
        yield Product("router", 1, experts, tokens, read, gradients=1)
        yield Product("router", 1, experts, tokens, experts, gradients=1)
    if config.gate == "mlp" and config.layer_heads and call.has_losses:
        yield Product("router", 1, tokens, read, width)  # the hidden layer again, for the head
        yield Product("router", 1, tokens, width, config.latent_channels * config.patch_size**2)


def _experts(config: ModelConfig, call: Call) -> Iterator[Product]:
    yield Product("routed", 2 if config.expert == "swiglu" else 1, call.rows, config.width, config.expert_width)
    yield Product("routed", 1, call.rows, config.expert_width, config.width)
