"""The ledger: FLOPs of one optimizer step, by what they are spent on.

Model FLOPs are a forward and a backward of every trained rollout step, each once: what the mathematics needs.
Everything else a schedule computes is booked as wasted: first passes, recomputed blocks, steps that train nothing.
"""

from dataclasses import replace
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.families import rows_of_call
from sharpmoe.model.flops import Call, backward_flops, forward_flops, products
from sharpmoe.train.terms import has_routing_loss


class Ledger(NamedTuple):
    """FLOPs per trained image, over all of its rollout steps."""

    dense: float
    routed: float
    router: float
    wasted: float

    @property
    def model(self) -> float:
        """What the mathematics needs: model FLOP utilisation is told of these."""
        return self.dense + self.routed + self.router


class Passes(NamedTuple):
    """How often a trajectory goes through the model in one optimizer step."""

    trained: int  # rollout steps with a forward and a backward
    forwards: int  # of the whole model
    first: int = 0  # of them: forwards of steps that are run again, without what only losses need
    recomputed: bool = False  # the blocks of trained steps run a second time, in backward


def passes(run: RunConfig) -> Passes:
    """Count the passes of the run's schedule (docs/design/0003)."""
    rollout = run.rollout
    if run.stage == "pretrain":
        return Passes(1, 1)
    steps = rollout.num_steps
    if rollout.schedule in ("plain", "checkpoint"):
        return Passes(steps, steps, recomputed=rollout.schedule == "checkpoint")
    if rollout.schedule == "segments":
        again = rollout.segment_steps - rollout.steps_kept
        return Passes(rollout.segment_steps, steps + again, again)
    if not has_routing_loss(run) and rollout.merged_steps == 1:
        return Passes(steps, steps)
    again = steps - rollout.steps_kept
    return Passes(steps, steps + again, again)


def ledger(run: RunConfig, text_tokens: int, rows: float) -> Ledger:
    """Book one trained image.

    text_tokens: per caption, padding included. rows: that experts computed for an image at a rollout step, over all MoE
    layers: as the routing was, or `rows_expected`. Every step has as many: no rule of training looks at the time.
    """
    uses_x0_prev = run.stage == "posttrain" and run.model.saliency_router
    call = Call(rows=rows, text_tokens=text_tokens, uses_x0_prev=uses_x0_prev)
    done, first = products(run.model, call), products(run.model, replace(call, for_losses=False))
    forward, backward, count = forward_flops(done), backward_flops(done), passes(run)
    dense, routed, router = (count.trained * (there + back) for there, back in zip(forward, backward, strict=True))
    wasted = (count.forwards - count.trained - count.first) * forward.total + count.first * forward_flops(first).total
    if count.recomputed:
        wasted += count.trained * forward_flops(product for product in done if product.in_block).total
    return Ledger(dense, routed, router, wasted)


def rows_expected(run: RunConfig, pool: int) -> float:
    """Rows of an image at a rollout step by the selection rule, where `pool` images compete in a call.

    What was really taken differs only by how many images happen to have no class.
    """
    config = run.model
    rows = rows_of_call(config, pool) / pool
    if config.unconditional_expert and config.class_dropout:
        dropped = run.rollout.caption_dropout
        rows = (1 - dropped) * rows + dropped * config.num_tokens
    return rows * config.num_moe_layers
