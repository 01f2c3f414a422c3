"""The difference of two weights as text for a console, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sharpmoe.report.weights_difference import Change, LayerDrift, WeightsDifference, part_of

_LISTED = 8  # names of new, missing or reshaped tensors on a console


def difference_text(found: WeightsDifference, names: tuple[str, str], with_experts: bool = False) -> str:
    """Return the tables: parts, MoE layers, and with_experts every expert; `names`: of the two weights."""
    compared = found.whole.tensors
    lines = [
        f"A        {names[0]}",
        f"B        {names[1]}",
        f"tensors  {compared} compared ({found.equal} equal bit for bit), {len(found.new)} only in B, "
        f"{len(found.missing)} only in A, {len(found.reshaped)} of another shape",
        f"change   |B - A| / |A| = {_number(found.whole.relative)} over {found.whole.values:,} values",
        *_unpaired(found),
        "",
        *_parts(found.parts),
    ]
    if found.layers:
        lines += ["", *_layers(found.layers), "", *_places(found.layers)]
    if with_experts and found.layers:
        lines += ["", *_experts(found.layers)]
    return "\n".join(lines)


def difference_json(found: WeightsDifference, names: tuple[str, str]) -> dict[str, object]:
    """Return all figures as JSON: every expert, and every name that only one of the two has."""
    return {
        "a": names[0],
        "b": names[1],
        "equal_tensors": found.equal,
        "whole": found.whole.figures(),
        "parts": {part: change.figures() for part, change in found.parts.items()},
        "layers": [_layer_json(layer) for layer in found.layers],
        "only_in_a": list(found.missing),
        "only_in_b": list(found.new),
        "other_shape": {name: [list(a), list(b)] for name, (a, b) in found.reshaped.items()},
    }


def _layer_json(layer: LayerDrift) -> dict[str, object]:
    return {
        "block": layer.block,
        "experts": [
            {
                "expert": each.expert,
                "matched": each.matched,
                "relative_change": each.change and each.change.relative,
                "cosine": each.change and each.change.cosine,
                "matched_relative_change": each.matched_change and each.matched_change.relative,
                "matched_cosine": each.matched_change and each.matched_change.cosine,
            }
            for each in layer.experts
        ],
        "related": layer.is_related,
        "mean_cosine_between_experts": {"a": layer.alike_before, "b": layer.alike_after},
        "parts": {part: change.figures() for part, change in layer.parts.items()},
        "parts_in_matched_order": {part: change.figures() for part, change in layer.reordered.items()},
    }


def _unpaired(found: WeightsDifference) -> list[str]:
    """Name what only one has, by part, and what has another shape."""
    lines = []
    for label, names in (("only in B", found.new), ("only in A", found.missing)):
        if names:
            parts = Counter(part_of(name) for name in names)
            shown = [f"{part} ({count})" for part, count in list(parts.items())[:_LISTED]]
            lines.append(f"{label:<17}{_joined(shown, len(parts))}")
    if found.reshaped:
        shown = [f"{name} {a} -> {b}" for name, (a, b) in list(found.reshaped.items())[:_LISTED]]
        lines.append(f"{'another shape':<17}{_joined(shown, len(found.reshaped))}")
    return lines


def _joined(shown: Sequence[str], count: int) -> str:
    return ", ".join(shown) + (f" and {count - len(shown)} more (--json lists all)" if count > len(shown) else "")


def _parts(parts: Mapping[str, Change]) -> list[str]:
    rows = [
        (part, f"{change.tensors}", f"{change.values:,}", _number(change.relative), _number(change.cosine))
        for part, change in parts.items()
    ]
    return _table(("part", "tensors", "values", "change", "cosine"), rows)


def _layers(layers: Sequence[LayerDrift]) -> list[str]:
    """One row per MoE layer; experts are compared with those that they are matched with."""
    parts = list(dict.fromkeys(part for layer in layers for part in layer.parts))
    rows = []
    for layer in layers:
        changes = [each.matched_change.relative for each in layer.experts if each.matched_change is not None]
        known = [value for value in changes if value is not None]
        spread = f"{_number(min(known))} .. {_number(max(known))}" if known else "-"
        alike = f"{_number(layer.alike_before)} -> {_number(layer.alike_after)}"
        beside = layer.reordered or layer.parts
        own = [_number(beside[part].relative) if part in beside else "-" for part in parts]
        rows.append((f"block {layer.block}", f"{len(layer.experts)}", spread, alike, *own))
    return _table(("MoE layer", "experts", "their change", "alike A -> B", *parts), rows)


def _places(layers: Sequence[LayerDrift]) -> list[str]:
    """Say whether experts kept their places, and where one went."""
    lines = []
    for layer in layers:
        if not layer.is_related:
            lines.append(f"block {layer.block}: the experts of A and B do not resemble each other: unrelated weights")
        elif layer.moves:
            moves = ", ".join(f"{i} -> {j}" for i, j in layer.moves)
            lines.append(f"block {layer.block}: experts have other places in B: {moves}{_followed(layer)}")
    return lines or ["experts: every one is most like the one in its own place"]


def _followed(layer: LayerDrift) -> str:
    """Whether the rows of the routers went with the experts, so that the layer computes the same."""
    parts = [part for part in layer.reordered if layer.reordered[part].moved != layer.parts[part].moved]
    if not parts:
        return ""
    changes = ((part, layer.reordered[part].relative, layer.parts[part].relative) for part in parts)
    pairs = (f"{part} {_number(followed)}, was {_number(kept)}" for part, followed, kept in changes)
    return f" (change in this order: {'; '.join(pairs)})"


def _experts(layers: Sequence[LayerDrift]) -> list[str]:
    rows = [
        (
            f"block {layer.block}",
            f"{each.expert}",
            "-" if each.matched is None else f"{each.matched}",
            *(
                (_number(each.matched_change.relative), _number(each.matched_change.cosine))
                if each.matched_change
                else "--"
            ),
            _number(each.change.cosine) if each.change else "-",
        )
        for layer in layers
        for each in layer.experts
    ]
    return _table(("MoE layer", "expert", "in B", "change", "cosine", "cosine, same place"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, others to the right."""
    cells = [head, *rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return lines


def _number(value: float | None) -> str:
    """Four decimals, or three digits of what is smaller; "-" where it is not defined."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"
