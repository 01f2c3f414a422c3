"""Command-line arguments that the launchers share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.errors import ConfigError

DEFAULT_DS_CONFIG = PROJECT_ROOT / "configs" / "zero3.json"


class TrainArguments(NamedTuple):
    """What launcher/train.py was asked for."""

    ds_config: Path  # DeepSpeed JSON
    config: Path | None  # run file; None: the quickstart
    overrides: tuple[str, ...]  # dotted overrides of the run file, as written
    dry_run: bool  # check everything, print the banner, stop


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the arguments of launcher/train.py (without the program's name).

    `--deepspeed FILE`, `--deepspeed --deepspeed_config FILE` and neither start the same run. DeepSpeed's own
    `add_config_arguments` is not used, because it makes `--deepspeed` a flag. `--local_rank`, which the `deepspeed`
    command appends, is accepted and unused: the rank comes from the environment.

    Raises:
        ConfigError: two different DeepSpeed files are named, or a word is neither a known option nor an override.
    """
    known, overrides = _train_parser().parse_known_args(list(argv))
    if known.deepspeed and known.deepspeed_config and known.deepspeed != known.deepspeed_config:
        raise ConfigError(
            f"--deepspeed names {known.deepspeed} and --deepspeed_config names {known.deepspeed_config}; "
            "give one DeepSpeed file"
        )
    ds_config = known.deepspeed or known.deepspeed_config or DEFAULT_DS_CONFIG
    return TrainArguments(ds_config, known.config, tuple(overrides), known.dry_run)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launcher/train.py",
        description="Train a run: pretrain a base, or post-train it with SharpMoE.",
        epilog="Any key of the run file can be overridden: --section.key VALUE or --section.key=VALUE (YAML values).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deepspeed", nargs="?", type=Path, metavar="FILE", help="DeepSpeed JSON (default configs/zero3.json)"
    )
    parser.add_argument("--deepspeed_config", type=Path, metavar="FILE", help="the same, spelled in two words")
    parser.add_argument("--config", type=Path, metavar="FILE", help="run file (default configs/runs/quickstart.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the banner, stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser
