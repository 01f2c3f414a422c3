"""What happened to the pictures and captions that were taken: counted shard by shard, summed for the closing table."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipeline.members import encode_json
from data_pipeline.sources.items import Skipped, shown
from sharpmoe.durable import publish_once

_REASONS = 20  # that a table lists
_TARGETS = 4  # resolutions that a table names
_ADDED = ("flat_maps", "substituted")  # newer than the first folders; left out at zero
_NUMBER = re.compile(r"(?<![\w.+-])\d+(?![\w.])")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over samples; `longest` and `kept` are maxima."""

    pictures: int = 0
    enlarged: int = 0  # pictures with fewer pixels than the target, each way
    captions: int = 0
    cut: int = 0  # captions with more tokens than the encoder takes
    longest: int = 0  # tokens of the longest caption, before it is cut
    kept: int = 0  # tokens that the encoder takes
    flat_maps: int = 0  # pictures whose saliency map is the same everywhere
    substituted: int = 0  # pictures that lack what their saliency map is made of, and have another

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            pictures=self.pictures + other.pictures,
            enlarged=self.enlarged + other.enlarged,
            captions=self.captions + other.captions,
            cut=self.cut + other.cut,
            longest=max(self.longest, other.longest),
            kept=max(self.kept, other.kept),
            flat_maps=self.flat_maps + other.flat_maps,
            substituted=self.substituted + other.substituted,
        )

    def lines(self, targets: Iterable[tuple[int, int]], fit: str) -> list[str]:
        """Return lines of the closing table; `targets`: trained resolutions (H, W)."""
        if not self.pictures:
            return []
        names = [f"{height}x{width}" for height, width in targets]
        listed = ", ".join(names[:_TARGETS]) + (f" and {len(names) - _TARGETS} more" if len(names) > _TARGETS else "")
        target = f"the target {listed}" if len(names) == 1 else f"their bucket ({listed})"
        how = "cropped" if fit == "crop" else "padded with white"
        ends = f"{self.cut or 'none'} of {self.captions} cut at {self.kept} tokens (--max-length)"
        flat = f"{self.flat_maps} of {self.pictures} saliency maps are the same everywhere and so say nothing"
        other = f"{self.substituted} of {self.pictures} saliency maps are the substitutes that `missing` names"
        return [
            f"enlarged  {self.enlarged} of {self.pictures} pictures are smaller than {target} ({how})",
            *([f"captions  {ends}; the longest has {self.longest}"] if self.kept else []),
            *([f"flat      {flat}"] if self.flat_maps else []),
            *([f"replaced  {other}"] if self.substituted else []),
        ]


def write_counts(path: Path, counts: Counts) -> None:
    """Write the counts of a shard or of a folder, unless the file exists."""
    found = {name: value for name, value in dataclasses.asdict(counts).items() if value or name not in _ADDED}
    publish_once(path, encode_json(found))


def read_counts(path: Path) -> Counts:
    """Return the counts in a file; zeros where it does not exist or is of another version."""
    try:
        return Counts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Counts()


def left_out_lines(skipped: Iterable[Skipped], taken: int, splits: dict[str, int]) -> list[str]:
    """Return the lines of the closing table that say what was taken, and what was left out for which reason."""
    held = ", ".join(f"{name} {count}" for name, count in splits.items())
    reasons = reasons_of(skipped)
    lines = [f"taken     {taken} pictures: {held}", *no_held_out(splits), f"left out  {sum(reasons.values())}"]
    lines += [f"          {count} x {reason}" for reason, count in reasons.most_common(_REASONS)]
    more = len(reasons) - _REASONS
    return [*lines, f"          ... and {more} further reasons"] if more > 0 else lines


def no_held_out(splits: Iterable[str]) -> list[str]:
    """Return a line where nothing is held out, which happens to small sets, since a hash decides; else none."""
    if set(splits) != {"train"}:
        return []
    return ["held out  none: add a top-level val/ folder or a split, or train with --data.validation_split train"]


def reasons_of(skipped: Iterable[Skipped]) -> Counter[str]:
    """Count what was left out by reason; a reason that came up in one wording only keeps its name and numbers."""
    counts: Counter[str] = Counter()
    wordings: dict[str, str] = {}
    for entry in skipped:
        reason, full = _reason_of(entry), " ".join(entry.reason.split())
        counts[reason] += 1
        if wordings.setdefault(reason, full) != full:
            wordings[reason] = reason
    return Counter({wordings[reason]: count for reason, count in counts.items()})


def _reason_of(entry: Skipped) -> str:
    """Return a reason without what differs from picture to picture: the name and the numbers of rows and bytes."""
    reason = entry.reason
    stem = PurePosixPath(entry.name).stem
    for name in dict.fromkeys((stem, shown(stem))) if stem else ():  # it may hold spaces, brackets and dots
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?=\.)|(?<=/){re.escape(name)}(?!\w)", "NAME", reason)
    return " ".join(_NUMBER.sub("N", word) for word in reason.split())
