"""One MoE layer: route, dispatch, experts, combine, shared expert."""

from torch import Tensor

from sharpmoe import families
from sharpmoe.config import ModelConfig
from sharpmoe.moe.dispatch import Assignment, Counts, Dispatcher, LocalDispatcher
from sharpmoe.moe.experts import Experts, feed_forward
from sharpmoe.moe.router import Router
from sharpmoe.moe.routing import CallMode, Routing


class MoELayer(Router):
    """Mixture of expert MLPs in place of a block's MLP; the router family is a field of the configuration.

    It is a router with experts, not a module that holds one, so that parameters keep the names of its weights files
    (`moe.gate.weight`, `moe.experts.w1`, ...), by which their initial values are drawn too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dispatcher: Dispatcher = LocalDispatcher()  # replaced where several ranks share the experts
        self.experts = Experts(config.total_experts, config.width, config.expert_width, config.expert)
        self.shared = (
            None if config.shared == "none" else feed_forward(config.shared, config.width, config.shared_width)
        )

    def forward(
        self,
        h: Tensor,
        x0_prev_tokens: Tensor | None = None,
        unconditional: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> tuple[Tensor, Routing]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record. No side effects.

        x0_prev_tokens (B, N, D): the embedded x0_prev; None leaves the base routing. unconditional (B,) bool: images
        without class, where the layer has an expert of their own. mode: how the call is made, with this layer's own
        routing map where it replays one.
        """
        routing = self.route(h, x0_prev_tokens, unconditional, mode)
        counts = self._fixed_counts(h, is_replay=mode.replayed is not None)
        assignment = Assignment(routing.routing_map.flatten(0, 1), routing.gates.flatten(0, 1), counts)
        rows, rows_per_expert, ticket = self.dispatcher.dispatch(h.flatten(0, 1), assignment)
        out = self.experts(rows, rows_per_expert)
        y = self.dispatcher.combine(out, ticket).view_as(h)
        return (y if self.shared is None else y + self.shared(h)), routing

    def _fixed_counts(self, h: Tensor, is_replay: bool) -> Counts:
        """What the family fixes about the rows of experts for tokens h (B, N, D)."""
        images, tokens, _ = h.shape
        how = {"training": self.training, "pool_is_call": self.pool.is_call}
        return Counts(
            per_expert=families.rows_per_expert(self.config, images, tokens, **how),
            total=families.total_rows(self.config, images, tokens, **how, is_replay=is_replay),
        )
