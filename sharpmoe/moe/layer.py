"""One MoE layer: route, dispatch, experts, combine, shared expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe import families
from sharpmoe.config import ModelConfig
from sharpmoe.moe.dispatch import Assignment, Dispatcher, LocalDispatcher, RowCounts
from sharpmoe.moe.experts import Experts, feed_forward
from sharpmoe.moe.products import keeps_counts
from sharpmoe.moe.router import Router
from sharpmoe.moe.routing import CallMode, Routing


class BlockState(NamedTuple):
    """What a gate may read in place of the tokens that its experts get. A NamedTuple, because of ZeRO-3's hooks."""

    time: Tensor  # (B, D) embedded time
    tokens: Tensor  # (B, N, D) normalised, before modulation

    def features(self) -> Tensor:
        """Join time and tokens, (B, N, 2 D), in their dtype: the gate says which precision it needs."""
        return torch.cat([self.time.unsqueeze(1).expand(-1, self.tokens.shape[1], -1), self.tokens], dim=-1)


class MoELayer(Router):
    """Mixture of expert MLPs in place of a block's MLP; the router family is a field of the configuration.

    It inherits from `Router` instead of holding one, so that its parameters have the names of the weights files
    (`moe.gate.weight`, `moe.experts.w1`, ...). Initial values are drawn by these names too, so they must not change.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dispatcher: Dispatcher = LocalDispatcher()  # replaced if several ranks share the experts
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
        state: BlockState | None = None,
    ) -> tuple[Tensor, Routing]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record. No side effects.

        x0_prev_tokens (B, N, D): the embedded x0_prev; None leaves the base routing. unconditional (B,) bool: True for
        images without class, all of whose tokens go to the unconditional expert; None if the layer has no such expert.
        mode: how the call is made; to replay a choice it holds the routing map of this layer alone
        (`CallMode.for_layer`). state: of the block, which the gate reads with `gate_input: time_and_state`, and only
        then. Communicates if the dispatcher (experts on other ranks) or the pool (tokens of other
        ranks) does; those of a single rank do not.
        """
        features = h
        if self.config.gate_input == "time_and_state":
            assert state is not None
            features = state.features()
        routing = self.route(features, x0_prev_tokens, unconditional, mode)
        # With cutoffs every expert takes what reaches its own: nothing is known before.
        by_cutoff = self.training and mode.cutoff is not None
        counts = RowCounts() if by_cutoff else self._fixed_counts(h, is_replay=mode.replayed is not None)
        assignment = Assignment(routing.routing_map.flatten(0, 1), routing.gates.flatten(0, 1), counts)
        serve = self.serve if self._is_traceable(h, counts) else self.serve_untraced
        y = serve(h.flatten(0, 1), assignment).view_as(h)
        return (y if self.shared is None else y + self.shared(h)), routing

    def serve(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Send tokens x (R, D) to their experts and sum what comes back: (R, D)."""
        rows, rows_per_expert, ticket = self.dispatcher.dispatch(x, assignment)
        return self.dispatcher.combine(self.experts(rows, rows_per_expert), ticket)

    def serve_untraced(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Do the same; in a compiled block (`model.compiled`) it is replaced by one that torch.compile leaves alone."""
        return self.serve(x, assignment)

    def _is_traceable(self, h: Tensor, counts: RowCounts) -> bool:
        """Whether one graph fits every routing: experts are here, and no size has to be read from the device."""
        if not isinstance(self.dispatcher, LocalDispatcher):
            return False
        on_device = counts.total is not None and keeps_counts(h, self.experts.widths)
        return counts.per_expert is not None or on_device

    def _fixed_counts(self, h: Tensor, is_replay: bool) -> RowCounts:
        """Return what the family fixes about the number of rows for tokens h (B, N, D), whatever the scores.

        A row is one token's copy for one expert that took it: a token that two experts took has two rows.
        """
        images, tokens, _ = h.shape
        training, pool_is_call = self.training, self.pool.is_call
        return RowCounts(
            per_expert=families.rows_per_expert(
                self.config, images, tokens, training=training, pool_is_call=pool_is_call
            ),
            total=families.total_rows(
                self.config, images, tokens, training=training, pool_is_call=pool_is_call, is_replay=is_replay
            ),
            by_construction=not is_replay,
        )
