"""Types of command-line options with their bounds: a value outside of them ends a launcher with one line."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

_WHOLE = re.compile(r"[+-]?[0-9]+")
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Whole:
    """argparse type of a whole number from `least` to `most` (None: no bound)."""

    least: int = 1
    most: int | None = None

    def __str__(self) -> str:
        return f"a whole number {_range(self.least, self.most)}"

    def __call__(self, text: str) -> int:
        """Parse decimal digits. Raises argparse.ArgumentTypeError."""
        if not _WHOLE.fullmatch(text):
            raise _refusal(text, str(self))
        value = int(text)
        if value < self.least or (self.most is not None and value > self.most):
            raise _refusal(text, str(self))
        return value


@dataclass(frozen=True)
class Real:
    """argparse type of a finite number from `least` to `most` (None: no bound); `above` leaves out its bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        low = f"> {self.above:g}" if self.above is not None else ""
        return f"a finite number {low or _range(self.least, self.most)}".strip()

    def __call__(self, text: str) -> float:
        """Parse a decimal number, such as 0.5 or 1e-4. Raises argparse.ArgumentTypeError."""
        try:
            value = float(text)
        except ValueError:
            raise _refusal(text, str(self)) from None
        below = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        if not math.isfinite(value) or below or (self.most is not None and value > self.most):
            raise _refusal(text, str(self))
        return value


POSITIVE = Whole(1)
NOT_NEGATIVE = Whole(0)
SEED = Whole(0, _LARGEST_SEED)
SHARE = Real(least=0, most=1)
POSITIVE_REAL = Real(above=0)
NOT_NEGATIVE_REAL = Real(least=0)


def png_file(text: str) -> Path:
    """Parse the path of a PNG file to write; argparse type. Raises argparse.ArgumentTypeError for another ending."""
    if Path(text).suffix.lower() != ".png":
        raise _refusal(text, "a file whose name ends in .png")
    return Path(text)


def _range(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f"from {least:g} to {most:g}" if isinstance(most, float) else f"from {least} to {most}"
    return "" if least is None else f">= {least:g}"


def _refusal(text: str, allowed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text!r}, allowed: {allowed}")
