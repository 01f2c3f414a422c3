"""Copy weights of a checkpoint to one file, or to a folder that diffusers loads.

`python launcher/export.py RUN OUT.safetensors [--weights ema|live]` writes a weights file of this project;
`python launcher/export.py RUN OUT/ --to diffusers` writes what
`DiffusionPipeline.from_pretrained(OUT, custom_pipeline=OUT, trust_remote_code=True)` reads, with a model card; of
backbone nucleus what `NucleusMoEImageTransformer2DModel.from_pretrained` reads, with the saliency routers beside it.
`--to pipeline` writes the former for any backbone.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from launcher.command import Command, Unread
from sharpmoe.checkpoint.adapters import export_adapters
from sharpmoe.model.build import build_model
from sharpmoe.model.published.export import PipelineExtras, write_folder, write_pipeline_folder
from sharpmoe.model.published.folder import ROUTERS_FILE
from sharpmoe.model.weights import WeightsFile, read_weights, save_weights, stored_as
from sharpmoe.report.card import local_places, model_card
from sharpmoe.report.runs import SavedModel, check_overwrites_no_weights, find_origin, find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="run folder (its latest checkpoint), or one checkpoint folder")
    add("out", type=Path, help=".safetensors file to write, whose reading needs no DeepSpeed; with --to a new folder")
    add("--weights", choices=("ema", "live"), default="ema", help="averaged (ema) or live weights")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters (default: float32; with --to that of converted weights)",
    )
    add(
        "--adapters",
        action="store_true",
        help="write the adapters of a LoRA run alone: OUT is a folder in peft's format; without it they are merged",
    )
    add(
        "--to",
        choices=_LAYOUTS,
        help="write a folder: pipeline, which diffusers loads with a pipeline that carries x0_hat, with model card and "
        "codec; diffusers, the same, but of backbone nucleus the folder of diffusers' own class",
    )


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.adapters:
        yield Unread("with --adapters", ("--dtype", "--to"))


def _act(arguments: argparse.Namespace) -> None:
    if arguments.adapters:
        count = export_adapters(
            find_saved_model(arguments.run, arguments.weights).weights.parent, arguments.out, arguments.weights
        )
        print(f"{arguments.out}: {count} adapted layers in peft's format, from {arguments.run} ({arguments.weights})")
        return
    saved = find_saved_model(arguments.run, arguments.weights)
    check_overwrites_no_weights(arguments.out, saved.weights)
    if arguments.to is not None:
        print(_to_folder(arguments, saved))
        return
    state, config, meta = read_weights(saved.weights)
    with torch.device("meta"):
        model = build_model(config)
    save_weights(arguments.out, stored_as(state, model, getattr(torch, arguments.dtype or "float32")), config, meta)
    size = arguments.out.stat().st_size / 1e6
    step = meta.get("step", "unknown")
    print(f"{arguments.out}: {len(state)} tensors, {size:.1f} MB, from {saved.weights} (step {step})")


def _to_folder(arguments: argparse.Namespace, saved: SavedModel) -> str:
    weights = WeightsFile(saved.weights)
    dtype = getattr(torch, arguments.dtype or weights.meta.get("dtype", "float32"))
    layouts = _LAYOUTS[arguments.to]
    files = layouts.get(weights.config.backbone, _write_pipeline)(arguments.out, weights, dtype, saved)
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{arguments.out}: {len(files)} files, {size:.1f} MB, from {weights.path}"


def _write_published(out: Path, weights: WeightsFile, dtype: torch.dtype, _: SavedModel) -> list[Path]:
    files = write_folder(out, weights.config, weights.tensor, dtype, weights.meta)
    if out / ROUTERS_FILE in files:  # whose header is that of the weights
        _warn_of_places(out, weights.meta)
    return files


def _write_pipeline(out: Path, weights: WeightsFile, dtype: torch.dtype, saved: SavedModel) -> list[Path]:
    origin = find_origin(saved, weights.meta)
    with torch.device("meta"):
        counts = build_model(weights.config).count_parameters()
    sample = saved.run.sample.model_dump(mode="json", exclude={"captions"}) if saved.run else {}
    card = model_card(saved, weights.config, weights.meta, origin, counts)
    files = write_pipeline_folder(out, weights, dtype, PipelineExtras(card=card, origin=origin, sample=sample))
    _warn_of_places(out, origin)
    return files


def _warn_of_places(out: Path, origin: Mapping[str, str]) -> None:
    places = local_places(origin)
    if places:
        print(
            f"warning: {out}: its files show {', '.join(dict.fromkeys(places))}, absolute paths of this machine; "
            "before you publish, prepare and train with Hub ids or relative paths; as it is, readers pass "
            "from_pretrained(..., places={path: theirs})",
            file=sys.stderr,
        )


_Writer = Callable[[Path, WeightsFile, torch.dtype, SavedModel], list[Path]]
_LAYOUTS: dict[str, dict[str, _Writer]] = {  # --to -> backbone -> writer, where it is not the folder with a pipeline
    "diffusers": {"nucleus": _write_published},
    "pipeline": {},
}

main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
