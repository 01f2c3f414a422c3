"""What a run shows, in sentences made from its stored figures and their intervals: the rules, one function each.

A rule reads what `run_figures.describe_run` returns and says nothing where it does not apply. A change counts where its
95 % interval excludes 0; "equal" also takes an interval narrow enough to say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sharpmoe.moe.influence import strength_of
from sharpmoe.report.run_figures import AFTER, BEFORE, strength_at_the_end

_Json = dict[str, Any]
_Level = Literal["good", "bad", "warning", "note", "unknown"]

_EQUAL = 0.02  # flow losses are equal where the interval of their difference lies within this share of the loss
_DATA_BOUND = 0.2  # share of a step that waits for data
_ENOUGH_STEPS = 3  # logged steps after the first, for figures of speed
_OVERLOAD = 4.0  # load of the most loaded expert over the mean, above which it is said
_PAST_BEST = 0.02  # the last validation is worse than the best by more than this share of it
_ALL = "all t"
_CORRELATION = "rank correlation"  # of experts per token with saliency: the unit of how far compute moved


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of a verdict."""

    rule: str  # name of the rule that says it
    level: _Level
    text: str


def verdict_of_run(run: _Json) -> list[_Json]:
    """Return what a described run shows, the answer to the run's question first, as JSON values."""
    findings = [finding for rule in _RULES for finding in rule(run)]
    return [asdict(finding) for finding in findings]


def verdict_of_change(change: Mapping[str, Any], reference: _Json | None, names: tuple[str, str]) -> list[_Json]:
    """Return what the paired changes of one run against another show.

    change: `run_figures.changes_of`; reference: the allocation that they are relative to; names: of the other run and
    of the run it is compared with.
    """
    prefix = f"{names[0]} against {names[1]}: "
    if not change:
        text = f"{prefix}not enough measured to compare allocation and flow loss (no allocations of the same images)"
        return [asdict(Finding(rule="allocation", level="unknown", text=text))]
    return [asdict(finding) for finding in _change(change, reference or {}, prefix)]


def interval_text(value: Mapping[str, Any] | None, sign: str = "+") -> str:
    """Return a mean and its interval, such as "+0.19 [0.16, 0.22]"; "not measured" for None."""
    if value is None or value.get("mean") is None:
        return "not measured"
    if value.get("low") is None:
        return f"{value['mean']:{sign}.3g}"
    return f"{value['mean']:{sign}.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def _allocation(run: _Json) -> Iterator[Finding]:
    """Did compute move to salient tokens, and at which price in flow loss?"""
    if run["settings"].get("model.router") == "dense":
        return
    if run["settings"].get("stage") == "pretrain":  # what it starts from is no model to compare with
        after = run["allocation"]["results"].get(AFTER, {}).get("saliency", {}).get(_ALL)
        if after is not None:
            text = f"experts per token follow saliency with a rank correlation of {after['mean']:.3g}"
            error = "" if after["error"] is None else f" ± {after['error']:.2g} (standard error)"
            yield Finding(rule="allocation", level="note", text=text + error)
            return
    change = run["allocation"]["change"]
    if change:
        yield from _change(change, run["allocation"]["results"][BEFORE], "")
        return
    known = [name for name in (BEFORE, AFTER) if name in run["allocation"]["results"]]
    have = f"only allocation/{known[0]}.json" if known else "no allocation"
    yield Finding(
        rule="allocation",
        level="unknown",
        text=f"not enough measured to say whether compute moved: {have} (log.allocation; before and after a whole run)",
    )


def _change(change: Mapping[str, Any], reference: _Json, prefix: str) -> Iterator[Finding]:
    """Say what happened to allocation and flow loss, in one sentence where compute moved."""
    moved, flow = change.get("saliency", {}).get(_ALL), change.get("flow", {}).get(_ALL)
    judged, price = _judge_flow(flow, reference)
    if _excludes_zero(moved):
        towards = "to" if moved["mean"] > 0 else "away from"
        level: _Level = "good" if moved["mean"] > 0 and judged != "bad" else "warning"
        joined = ", but" if judged == "bad" else " at" if price.startswith("equal") else ","
        text = f"compute moved {towards} salient tokens: {_CORRELATION} {interval_text(moved)}{joined} {price}"
        yield Finding(rule="allocation", level=level, text=prefix + text)
    elif moved is None or moved["low"] is None:
        text = "not enough measured to say whether compute moved: no two images with an allocation before and after"
        yield Finding(rule="allocation", level="unknown", text=prefix + text)
    else:
        told = f"{_CORRELATION} {interval_text(moved)}{_by_time(change)}"
        text = f"compute did not measurably move to salient tokens: {told}"
        yield Finding(rule="allocation", level="note", text=prefix + text)
        yield Finding(rule="flow", level=judged, text=prefix + price)
    spent = change.get("experts", {}).get(_ALL)
    if _excludes_zero(spent) and abs(spent["mean"]) > 0.01:
        more = "more" if spent["mean"] > 0 else "fewer"
        text = f"{more} experts per token are computed: {interval_text(spent)}, so compute is not equal"
        yield Finding(rule="compute", level="warning", text=prefix + text)


def _by_time(change: Mapping[str, Any]) -> str:
    """Return at which times compute moved, where over all of them it did not."""
    ranges = {name: value for name, value in change["saliency"].items() if name != _ALL and _excludes_zero(value)}
    told = ", ".join(f"{name} {interval_text(value)}" for name, value in ranges.items())
    return f"; by time: {told}" if told else ""


def _judge_flow(flow: Mapping[str, Any] | None, reference: _Json) -> tuple[_Level, str]:
    """Return whether the flow loss changed, and a phrase that says it."""
    known = (reference.get("flow", {}).get(_ALL) or {}).get("mean")
    if flow is None or flow["low"] is None or known is None:
        return "unknown", "unknown flow loss (no two images measured before and after)"
    told = f"{interval_text(flow)} of {known:.3g}"
    if max(abs(flow["low"]), abs(flow["high"])) <= _EQUAL * abs(known):
        if not _excludes_zero(flow):
            return "note", f"equal flow loss to {_EQUAL:.0%} ({told})"
        return "note", f"flow loss a little {'worse' if flow['low'] > 0 else 'better'}, within {_EQUAL:.0%} ({told})"
    if flow["low"] > 0:
        return "bad", f"flow loss got worse: {told}"
    if flow["high"] < 0:
        return "good", f"flow loss fell: {told}"
    return "unknown", f"flow loss not told apart ({interval_text(flow)})"


def _strength(run: _Json) -> Iterator[Finding]:
    """Do the saliency routers decide anything, or everything?"""
    figures = strength_at_the_end(run)
    strength = strength_of(figures)
    if not run["settings"].get("model.saliency_router", True) or not strength:
        return
    share = f"{figures.get('flipped', 0.0):.2g} of the choices, spread {figures['spread']:.2g} of the gates'"
    if strength == "inert":
        text = f"the saliency routers barely change routing: {share}; optim.lr_scale raises their rate"
        yield Finding(rule="strength", level="warning" if figures["spread"] else "note", text=text)
    else:
        yield Finding(rule="strength", level="warning", text=f"the saliency routers decide nearly alone: {share}")


def _data(run: _Json) -> Iterator[Finding]:
    """Does the run wait for data?"""
    share = run["speed"].get("data_wait_share")
    if share is None or share["steps"] < _ENOUGH_STEPS or share["mean"] < _DATA_BOUND:
        return
    bounds = "" if share["low"] is None else f" [{max(share['low'], 0):.0%}, {min(share['high'], 1):.0%}]"
    text = f"data-bound: {share['mean']:.0%}{bounds} of a step waits for data; data.num_workers reads ahead"
    yield Finding(rule="data", level="warning", text=text)


def _validation(run: _Json) -> Iterator[Finding]:
    """Is the last model the best one?"""
    curve = run["curves"].get("validation/flow")
    if curve is None:
        yield Finding(rule="validation", level="unknown", text="no validation: held-out flow loss was not measured")
        return
    split, trained = (run["settings"].get(f"data.{which}_split") for which in ("validation", "train"))
    if split is not None and str(split).partition(":")[0] == trained:
        text = f"nothing is held out: split {split} is measured, which the run is trained on; that hides memorising"
        yield Finding(rule="validation", level="warning", text=text)
    points = dict(zip(curve["steps"], curve["values"], strict=True))
    best, last = min(points, key=lambda step: points[step]), max(points)
    if points[last] > (1 + _PAST_BEST) * points[best]:
        text = (
            f"held-out flow loss was best after step {best} ({points[best]:.4g}) and is {points[last]:.4g} after step "
            f"{last}"
        )
        yield Finding(rule="validation", level="warning", text=text)


def _experts(run: _Json) -> Iterator[Finding]:
    """Are there experts without tokens, or with most of them?"""
    dead = [value for value in run["layers"].get("routing_dead_experts", []) if value]
    if dead:
        text = f"dead experts: {sum(dead):g} in {len(dead)} layer(s) had no token in the last logged step"
        yield Finding(rule="experts", level="warning", text=text)
    loads = [value for value in run["layers"].get("routing_load_max", []) if value is not None]
    if loads and max(loads) > _OVERLOAD:
        where = f"MoE layer {loads.index(max(loads))}"
        text = f"unbalanced experts: the most loaded one of {where} took {max(loads):.2g} times the mean load"
        yield Finding(rule="experts", level="warning", text=text)


def _progress(run: _Json) -> Iterator[Finding]:
    """Is the run complete?"""
    done, total = run["progress"]["done"], run["progress"]["total"]
    if not done:
        yield Finding(rule="progress", level="unknown", text="no step is logged yet")
    elif isinstance(total, int) and done < total:
        yield Finding(rule="progress", level="note", text=f"not finished: step {done} of {total}")
    faults = sum(event["event"] == "fault" for event in run["events"])
    if faults:
        yield Finding(rule="progress", level="warning", text=f"{faults} step(s) with a fault (log.jsonl)")
    if any(event["event"] == "save failed" for event in run["events"]):
        yield Finding(rule="progress", level="warning", text="a checkpoint could not be saved (log.jsonl)")


def _excludes_zero(value: Mapping[str, Any] | None) -> bool:
    """Whether the interval of a change is known and lies on one side of 0."""
    return value is not None and value["low"] is not None and (value["low"] > 0 or value["high"] < 0)


_RULES: Sequence[Callable[[_Json], Iterator[Finding]]] = (
    _allocation,
    _strength,
    _data,
    _validation,
    _experts,
    _progress,
)
