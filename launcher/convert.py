"""Convert published weights to a weights file of this project, and back.

`python launcher/convert.py checkpoint.pth OUT.safetensors --family promoe --router ec --config RUN.yaml` writes a file
that a run can start from (checkpoint.init), and the run file; `python launcher/convert.py OURS.safetensors
OUT.safetensors --to promoe` writes weights of this project under published key names.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from launcher.bounds import POSITIVE
from launcher.command import Command, Unread
from launcher.published import READING_OPTIONS, add_reading_options, sizes_of
from sharpmoe.config import ModelConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.invocation import spell_command
from sharpmoe.model.build import build_model
from sharpmoe.model.published.export import convert_folder, dtype_name, write_folder
from sharpmoe.model.published.folder import PublishedFolder, local_folder
from sharpmoe.model.published.load import describe, read_pretrained
from sharpmoe.model.published.names import CHECKPOINT_FAMILIES, CONVENTIONS, ROUTERS, to_published
from sharpmoe.model.published.run_file import check_free, write_run_file
from sharpmoe.model.weights import WeightsFile, load_model, save_weights
from sharpmoe.report.runs import check_overwrites_no_weights, find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="published .pth, .pt, .safetensors, index or folder; with --to a weights file or run folder of this "
        "project",
    )
    add("out", type=Path, help=".safetensors file to write")
    add("--family", choices=CHECKPOINT_FAMILIES, default="promoe", help="family of the source")
    routers = sorted({router for known in ROUTERS.values() for router in known})
    add("--router", choices=routers, help="router of the source (default: the only one of its family, else dense)")
    add("--to", choices=CHECKPOINT_FAMILIES, help="write weights of this project under the key names of this family")
    add("--text-width", type=POSITIVE, help="extend a class-conditional model to text states of this width")
    add("--config", type=Path, metavar="RUN.yaml", help="also write a run file that post-trains the weights")
    add("--shards", metavar="PLACE", help="prepared data to name in the run file (default: data/imagenet256)")
    add_reading_options(parser)


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.to:
        yield Unread("with --to", ("--family", "--router", "--text-width", "--config", "--shards", *READING_OPTIONS))
    elif arguments.config is None:
        yield Unread("without --config", ("--shards",))
    if arguments.family not in CONVENTIONS:
        yield Unread(f"with --family {arguments.family}, whose models read text already", ("--text-width",))
        yield Unread(f"with --family {arguments.family}, which stores one kind of weights", ("--weights",))


def _act(arguments: argparse.Namespace) -> None:
    print(_to_published(arguments) if arguments.to else _from_published(arguments))


def _from_published(arguments: argparse.Namespace) -> str:
    check_overwrites_no_weights(arguments.out, arguments.source)
    if arguments.config is not None:
        check_free(arguments.config)
        if arguments.text_width and arguments.shards is None:
            raise ConfigError("--config with --text-width needs --shards: prepared data with captions")
    width = {"text_width": arguments.text_width, "pooled_width": arguments.text_width} if arguments.text_width else {}
    routers = ROUTERS[arguments.family]
    router = arguments.router or (routers[0] if len(routers) == 1 else "dense")
    if arguments.family not in CONVENTIONS:
        return _from_folder(arguments, router)
    model, report = read_pretrained(
        arguments.source,
        arguments.family,
        router,
        conditioning="text" if arguments.text_width else "class",
        weights=arguments.weights,
        **sizes_of(arguments),
        **width,
    )
    origin = f"{arguments.family}/{router}, {report.kind}"
    save_weights(arguments.out, model.state_dict(), model.config, {"published": origin})
    lines = [*report.lines(), *describe(model)]
    lines += _run_file(arguments, model.config, origin)
    size = arguments.out.stat().st_size / 1e6
    return "\n".join([*lines, f"{arguments.out}: {size:.1f} MB; {report.line()}"])


def _run_file(arguments: argparse.Namespace, config: ModelConfig, origin: str) -> list[str]:
    """Write the run file that --config asks for; return the line that says so."""
    if arguments.config is None:
        return []
    write_run_file(
        arguments.config,
        config,
        arguments.out,
        source=arguments.source.name,
        origin=f"{origin} weights",
        shards=arguments.shards,
    )
    check = f"{spell_command('train')} --config {shlex.quote(str(arguments.config))} --dry-run"
    return [f"run file    {arguments.config}; check it with: {check}"]


def _from_folder(arguments: argparse.Namespace, router: str) -> str:
    """Convert a folder with a configuration, tensor by tensor."""
    sizes = {name: value for name, value in sizes_of(arguments).items() if value is not None}
    folder = PublishedFolder(local_folder(arguments.source), **sizes)
    origin = f"{arguments.family}/{router}, plain"
    convert_folder(folder, arguments.out, {"published": origin})
    with torch.device("meta"):
        lines = describe(build_model(folder.config))
    lines += _run_file(arguments, folder.config, origin)
    size, kind = arguments.out.stat().st_size / 1e6, dtype_name(folder.dtype)
    return "\n".join([*lines, f"{arguments.out}: {size:.1f} MB, {len(folder.names)} tensors, {kind}"])


def _to_published(arguments: argparse.Namespace) -> str:
    source = find_saved_model(arguments.source).weights
    check_overwrites_no_weights(arguments.out, source)
    if arguments.to not in CONVENTIONS:
        weights = WeightsFile(source)
        dtype = getattr(torch, weights.meta.get("dtype", "float32"))
        files = write_folder(arguments.out, weights.config, weights.tensor, dtype, weights.meta)
        return f"{arguments.out}: {len(files)} files in the layout of {arguments.to}"
    model, _ = load_model(source)
    state = to_published(model.state_dict(), model.config, arguments.to)
    contiguous = {key: value.contiguous() for key, value in state.items()}
    write_atomically(arguments.out, lambda draft: save_file(contiguous, draft))
    return f"{arguments.out}: {len(state)} tensors under the names of {arguments.to}"


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
