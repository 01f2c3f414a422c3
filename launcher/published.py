"""Options of the launchers that read published checkpoints: which weights of a file, and sizes that it lacks."""

import argparse
from typing import Any

from launcher.bounds import POSITIVE, POSITIVE_REAL

_SIZES = ("num_heads", "latent_size", "num_classes", "top_k", "capacity")
READING_OPTIONS = ("--weights", *(f"--{name.replace('_', '-')}" for name in _SIZES))


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add --weights and the options of `sizes_of` to a parser."""
    add = parser.add_argument
    weights = "averaged or live weights of a training checkpoint (default: ema where there are any, else model)"
    add("--weights", choices=("ema", "model"), help=weights)
    add("--num-heads", type=POSITIVE, help="for a width that does not determine it")
    size = "for a checkpoint without stored positions; else, where it differs, positions are made for this size"
    add("--latent-size", type=POSITIVE, help=size)
    add("--num-classes", type=POSITIVE, help='rows of the label table without the one for "no class"')
    add("--top-k", type=POSITIVE, help="experts per token, for a family that does not determine it")
    add("--capacity", type=POSITIVE_REAL, help="mean experts per token (default: 1)")


def sizes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that were given, None for the others, as `load_pretrained` takes them."""
    return {name: getattr(arguments, name) for name in _SIZES}
