"""Identify a published checkpoint: `python launcher/identify.py FILE [--shards data/fluent64] [--family promoe]`.

Prints the families whose key names it has and its sizes; with shards also its held-out loss under every known time
convention, which shows a wrong one. Exit code 1 where the named family, or every convention, is wrong.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.read.shards import ShardSet
from launcher.bounds import POSITIVE
from launcher.command import Command, Unread
from launcher.devices import DEVICE_HELP, device_name
from launcher.published import READING_OPTIONS, add_reading_options, sizes_of
from sharpmoe.evaluation.identify import identify
from sharpmoe.invocation import spell_command
from sharpmoe.model.build import build_model
from sharpmoe.model.published.folder import PublishedFolder, is_published_folder
from sharpmoe.model.published.load import describe
from sharpmoe.model.published.names import CHECKPOINT_FAMILIES
from sharpmoe.model.published.read import read_state

_FOLDER_FAMILY = "nucleus"  # the one that is read from a folder with a configuration


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help=".pth, .pt or .safetensors file, or a folder with the shards of a checkpoint")
    add("--family", choices=CHECKPOINT_FAMILIES, help="check that the checkpoint is of this family")
    add("--shards", help="prepared data with the latents that the checkpoint was trained on")
    add("--split", default="unseen", help="held-out split")
    add("--images", type=POSITIVE, default=64, help="held-out images")
    add_reading_options(parser)
    add("--device", type=device_name, default="auto", help=f"device that measures the loss: {DEVICE_HELP}")


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    of_a_loss = ("--split", "--images", "--device")
    if is_published_folder(arguments.file):
        why = f"for a folder whose config.json says what it is ({arguments.file})"
        yield Unread(why, ("--shards", *of_a_loss, *READING_OPTIONS))
    elif arguments.shards is None:
        yield Unread("without --shards, on which the loss is measured", of_a_loss)


def _act(arguments: argparse.Namespace) -> int:
    if is_published_folder(arguments.file):
        return _describe_folder(arguments)
    shards = None if arguments.shards is None else ShardSet.open(arguments.shards, arguments.split)
    state = read_state(arguments.file, arguments.weights)
    sizes, where = sizes_of(arguments), str(arguments.file)
    found = identify(state.tensors, shards, arguments.images, sizes, arguments.device, where)
    print(f"read        {'; '.join(state.notes)}")
    print(found)
    problem = found.problem(arguments.family)
    if problem is not None:
        print(f"warning: {arguments.file}: {problem}", file=sys.stderr)
    return 0 if problem is None else 1


def _describe_folder(arguments: argparse.Namespace) -> int:
    """Print what a folder with a configuration is, which leaves nothing to find out."""
    folder = PublishedFolder(arguments.file)
    with torch.device("meta"):
        lines = describe(build_model(folder.config))
    print(f"candidates  {_FOLDER_FAMILY}/{folder.config.router}, as {folder.path / 'config.json'} says")
    print("\n".join(lines))
    config = folder.config
    print(f"capacities  {list(config.capacities or [config.capacity] * config.depth)}: model.capacities of a run file")
    print(
        f"read by     {spell_command('convert')} --family {_FOLDER_FAMILY}, sharpmoe.load(FOLDER), checkpoint.init, "
        "and the commands that take weights"
    )
    if arguments.family not in (None, _FOLDER_FAMILY):
        print(f"warning: {arguments.file}: it is of family {_FOLDER_FAMILY}, not {arguments.family}", file=sys.stderr)
        return 1
    return 0


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
