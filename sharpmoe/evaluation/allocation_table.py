"""Allocations as text: the whole table for files and reports, and the rows that answer the question for a console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sharpmoe.evaluation.allocation import (
    ALLOCATION_RANGES,
    IMAGE_PARTS,
    NUM_FIFTHS,
    UNKNOWN_MEAN,
    Allocation,
    ImageMean,
    flow_of_part,
    paired_change,
)
from sharpmoe.moe.influence import strength_of

_TITLES = {
    "saliency": "Spearman, experts per token with saliency M",
    "foreground": "Spearman, experts per token with the foreground mask",
    "experts": "experts per token, MoE layer and step: total compute",
    "flow": "flow loss",
    "flow_markov": "flow loss, noise of a Markov chain",  # not in every result
}
_PARTS_OF_RANGES = IMAGE_PARTS[-3:]  # shown for each range of t; all of them for all t
_FIGURES = {
    "spread": "saliency router: spread of its logits over tokens, over that of the gate's",
    "flipped": "saliency router: share of choices that the gate alone would not make",
    "agreement": "correlation of experts per token with M, mean over MoE layers and images",
}

_LEGEND = """\
  spread: 0 where a saliency router is untrained, 1 where it varies as much as the gate
  correlation of the last rows: Pearson's, in each MoE layer and at each time alone;
  that of the first rows: of ranks, of the experts summed over MoE layers and times
  saliency_agreement_* of a run's log may have another sign in DiffMoE and Expert Race: there tokens
  of images at one t compete (training, rollout.pool: step), here thresholds choose (inference)
  times: the same for every model, not shifted (rollout.shift)"""  # what titles do not say


def allocation_table(results: Mapping[str, Allocation]) -> str:
    """Return a text table with one column per result; two results of the same images also get their paired change."""
    columns, paired = list(results.values()), _are_paired(results)
    lines = _head(results)
    for what in _TITLES:
        rows = _rows(columns, what, paired)
        lines += rows
        lines += _fifths(columns, IMAGE_PARTS[:NUM_FIFTHS]) if rows and what == "experts" else []
    lines += _flow_of_parts(columns, paired)
    if any(sum(column.constant.values()) for column in columns):
        lines.append("images left out of the correlation with M: all tokens equal")
        lines += [_line("  " + name, [str(column.constant[name]) for column in columns]) for name in ALLOCATION_RANGES]
    lines += _strengths(columns)
    lines += [note for name, column in results.items() if (note := _strength_note(name, column))]
    return "\n".join(lines)


def short_allocation_table(results: Mapping[str, Allocation], full: Path | str) -> str:
    """Return the rows of `allocation_table` that answer the question, and where the others are: in the file `full`."""
    columns, paired = list(results.values()), _are_paired(results)
    experts = ["experts per token by saliency", *_fifths(columns, (IMAGE_PARTS[0], IMAGE_PARTS[NUM_FIFTHS - 1]))]
    lines = [*_head(results), *_rows(columns, "saliency", paired), *experts, *_rows(columns, "flow", paired)]
    lines += _strength_rows(columns, "flipped", _percent)
    lines += [note for name, column in results.items() if (note := _strength_note(name, column))]
    return "\n".join([*lines, f"all figures: {full}"])


def measured_images(count: int, splits: Iterable[str]) -> str:
    """Say how many images of which splits were measured: held-out ones, unless the split is `train`."""
    names = list(splits)
    held_out = all(name.partition(":")[0] != "train" for name in names)
    of = f" of {' and '.join(names)}" if names else ""
    return f"{count} held-out images{of}" if held_out else f"{count} images{of} (not held out)"


def _are_paired(results: Mapping[str, Allocation]) -> bool:
    """Whether there are two results that can be compared image by image."""
    columns = list(results.values())
    return len(columns) == 2 and columns[0].is_comparable(columns[1])


def _head(results: Mapping[str, Allocation]) -> list[str]:
    first = next(iter(results.values()))
    of = measured_images(first.images, dict.fromkeys(result.split for result in results.values() if result.split))
    dtypes = dict.fromkeys(result.dtype for result in results.values())
    precision = "" if list(dtypes) == ["float32"] else f", in {' and '.join(dtypes)}"
    return [
        f"Allocation on {of}, {len(first.times)} times{precision} (mean ± standard error)",
        _line("", [*results, "change (paired)"] if _are_paired(results) else list(results)),
    ]


def _rows(columns: list[Allocation], what: str, paired: bool) -> list[str]:
    """Return the title and the rows by range of t of one figure; none where no result has it."""
    rows = {name: [getattr(column, what).get(name, UNKNOWN_MEAN) for column in columns] for name in ALLOCATION_RANGES}
    if not any(e.images for row in rows.values() for e in row):
        return []
    most = max(e.images for row in rows.values() for e in row)
    lines = [_TITLES[what] + (f" ({most} of the images)" if most < columns[0].images else "")]
    for name, row in rows.items():
        changes = [_cell(paired_change(columns[0], columns[1], what, name), "+")] if paired else []
        lines.append(_line("  " + name, [*map(_cell, row), *changes]))
    return lines


def _fifths(columns: list[Allocation], parts: Sequence[str]) -> list[str]:
    """Return rows of the experts per token in some of the fifths, the first of `IMAGE_PARTS`."""
    picked = {part: [c.experts_by_saliency["all t"][IMAGE_PARTS.index(part)] for c in columns] for part in parts}
    return [_line(_label("all t", part), [_cell(e) for e in row]) for part, row in picked.items()]


def _label(name: str, part: str) -> str:
    """Return the label of a part of the image in a range of t."""
    return f"  {name}: {part.replace('5th', 'fifth')}"


def _flow_of_parts(columns: list[Allocation], paired: bool) -> list[str]:
    """Return rows of the flow loss by part of the image; none where no result has it."""
    if not any(column.flow_parts for column in columns):
        return []
    lines = ["flow loss by part of the image: fifths by saliency M, and the foreground mask"]
    for name in ALLOCATION_RANGES:
        for part in IMAGE_PARTS if name == "all t" else _PARTS_OF_RANGES:
            row = [column.flow_parts.get(part, {}).get(name, UNKNOWN_MEAN) for column in columns]
            if any(e.images for e in row):
                changes = (
                    [_cell(paired_change(columns[0], columns[1], flow_of_part(part), name), "+")] if paired else []
                )
                lines.append(_line(_label(name, part), [*map(_cell, row), *changes]))
    return lines


def _strengths(columns: list[Allocation]) -> list[str]:
    """Return rows of the strength of the saliency routers over all layers, and what the titles leave unsaid."""
    lines = [line for what in _FIGURES for line in _strength_rows(columns, what, "{:.4f}".format)]
    return [*lines, _LEGEND] if lines else []


def _strength_rows(columns: list[Allocation], what: str, show: Callable[[float], str]) -> list[str]:
    """Return the title and the rows by range of t of one figure of strength; none where no result has it."""
    rows = {name: [c.strength.get("all", {}).get(name, {}).get(what) for c in columns] for name in ALLOCATION_RANGES}
    if all(value is None for row in rows.values() for value in row):
        return []
    shown = [_line("  " + name, ["" if v is None else show(v) for v in row]) for name, row in rows.items()]
    return [_FIGURES[what], *shown]


def _strength_note(name: str, result: Allocation) -> str:
    """Return what it means that the saliency routers decide little, or nearly alone; "" otherwise, or untrained."""
    figures = result.strength.get("all", {}).get("all t", {})
    strength, spread = strength_of(figures), figures.get("spread", 0.0)
    if not spread or not strength:  # exactly 0: never trained, as in every base
        return ""
    changed = _percent(figures.get("flipped", 0.0))
    if strength == "inert":
        return (
            f"note: the saliency routers of {name} change few choices yet ({changed} of them; spread\n"
            f"  {spread:.2g} of the gates'): usual in a short run at the default rate;\n"
            "  --optim.lr_scale '{saliency_router: 20}' lets them learn faster (docs/design/0010)"
        )
    return (
        f"warning: the saliency routers of {name} decide nearly alone ({changed} of the choices;\n"
        f"  spread {spread:.2g} times that of the gates): lower their learning rate (optim.lr_scale) or\n"
        "  loss.routing_weight (docs/design/0010)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _line(label: str, cells: list[str]) -> str:
    return f"{label:<34}" + "".join(f"{cell:>20}" for cell in cells)


def _cell(value: ImageMean, sign: str = "") -> str:
    if not value.images:
        return "undefined"
    return f"{value.mean:{sign}.4f} " + (f"± {value.error:.4f}" if value.images > 1 else "(1 image)")
