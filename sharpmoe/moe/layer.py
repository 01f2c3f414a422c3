"""One MoE layer: route -> select -> dispatch -> experts -> combine."""

from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.families import rows_per_expert, total_rows
from sharpmoe.moe.dispatch import Dispatcher, LocalDispatcher
from sharpmoe.moe.experts import Experts, feed_forward
from sharpmoe.moe.router import Router
from sharpmoe.moe.routing import Routing


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
        routing_map: Tensor | None = None,
        unconditional: Tensor | None = None,
        pools: int = 1,
        for_losses: bool = True,
    ) -> tuple[Tensor, Routing]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record. No side effects.

        x0_prev_tokens (B, N, D): the embedded x0_prev; None leaves the base routing. routing_map (B, N, E):
        replay this choice instead of making one (two-pass training in half precision, where a near-tie can flip).
        unconditional (B,) bool: images without class, where the layer has an expert of their own. pools: equal parts
        of the batch in which DiffMoE counts and ranks its tokens apart in inference; no other choice depends on it.
        for_losses: in training, make what only losses and thresholds read (capacity logits, similarity of prototypes,
        the layer's own prediction); for a first pass, whose steps are run again, those fields stay None.
        """
        record = self.route(
            h,
            x0_prev_tokens,
            routing_map=routing_map,
            unconditional=unconditional,
            pools=pools,
            for_losses=for_losses,
        )
        return self._serve(h, record, is_replay=routing_map is not None), record

    def _serve(self, h: Tensor, record: Routing, is_replay: bool) -> Tensor:
        tokens, chosen, gates = (part.flatten(0, 1) for part in (h, record.routing_map, record.gates))
        images, count = h.shape[:2]
        how = {"training": self.training, "pool_is_call": self.pool.is_call}
        each = rows_per_expert(self.config, images, count, **how)
        total = total_rows(self.config, images, count, **how, is_replay=is_replay)
        y = self.dispatcher(tokens, chosen, gates, self.experts, each, total).view_as(h)
        return y if self.shared is None else y + self.shared(h)
