"""Measure where models spend their experts on held-out images: `python launcher/evaluate.py BEFORE [AFTER ...]`.

With --metrics it judges sets of samples instead: `python launcher/evaluate.py SAMPLES.npz --metrics fd,kid,pr
--reference data/mine:unseen`. Both are .npz batches (`python launcher/sample.py --npz`), folders of pictures, or
splits of prepared shards; the reference may also be an .npz of published statistics (mu, sigma).

With --record-routing it only writes how many tokens of each image every expert takes; `python launcher/plan.py
--replay FILE` computes what that costs ranks that share the experts.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.bounds import NOT_NEGATIVE, POSITIVE, POSITIVE_REAL, SEED
from launcher.command import Command, Unread
from launcher.devices import DTYPES, placed, placement_arguments
from sharpmoe.console import print_note
from sharpmoe.durable import check_folder
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.allocation_table import allocation_table
from sharpmoe.evaluation.benchmarks import BENCHMARKS, read_result, result_names
from sharpmoe.evaluation.extractors import EXTRACTORS, ExtractorOptions
from sharpmoe.evaluation.metrics import METRICS, MetricSettings
from sharpmoe.evaluation.routing_record import record_routing
from sharpmoe.evaluation.sample_metrics import SampleFigures, figures_table, judge_sets
from sharpmoe.model.weights import load_model
from sharpmoe.report.comparison import (
    ComparisonSettings,
    check_held_out,
    compare_models,
    held_out_shards,
    write_comparison,
)
from sharpmoe.report.runs import average_note, find_saved_model
from sharpmoe.report.samples import slug

_MODELS = ("--weights", "--split", "--chunk", "--seed", "--dtype")
_SHEETS = ("--sheet-images", "--sheet-blocks", "--sheet-scale")
_SAMPLES = (
    "--reference",
    "--extractor",
    "--extractor-weights",
    "--unverified",
    "--bootstrap",
    "--captions",
    "--caption-prefix",
    "--batch-size",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run folder, checkpoint folder, .safetensors, exported folder or Nucleus-Image; SAMPLES with --metrics",
    )
    add("--names", nargs="+", help="column headings (default: before and after, or the models' names)")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add("--shards", help="prepared shards (default: those of the run)")
    add("--split", help="held-out split (default: that of the run)")
    add(
        "--images", type=POSITIVE, help="held-out images (default: 128); with --metrics the first so many samples (all)"
    )
    add("--chunk", type=POSITIVE, default=16, help="images per model call: the pool of DiffMoE")
    add("--sheet-images", type=NOT_NEGATIVE, default=8, help="images on a routing sheet; 0 draws none")
    add(
        "--sheet-blocks",
        nargs="+",
        type=NOT_NEGATIVE,
        default=(),
        metavar="N",
        help="also a routing sheet, and the difference of two models, of the MoE layer of each of these blocks",
    )
    add(
        "--sheet-scale",
        type=POSITIVE_REAL,
        help="end of the colours of routing sheets, so that those of several calls can be compared (the largest count)",
    )
    add("--seed", type=SEED, default=0, help="seed of the noise")
    add("--out", type=Path, default=Path("evaluation"), help="folder for the results")
    placement_arguments(parser)
    add(
        "--benchmark",
        choices=tuple(BENCHMARKS),
        help="print what its tool wrote: files instead of models",
    )
    add(
        "--record-routing",
        type=Path,
        metavar="FILE",
        help="write the tokens per image, step, MoE layer and expert of one model as JSON, and measure nothing else",
    )
    add = parser.add_argument_group("judge samples").add_argument
    add("--metrics", type=lambda text: tuple(text.split(",")), help=f"some of {', '.join(METRICS)}, with commas")
    add("--reference", help="real images: SET.npz, a folder or SHARDS:SPLIT; or statistics (.npz)")
    add(
        "--extractor",
        choices=tuple(EXTRACTORS),
        default="efficientnet-lite0",
        help="network whose features are compared",
    )
    add("--extractor-weights", type=Path, help="its weights, where they come in no package: a file or folder")
    add("--unverified", action="store_true", help="take Inception weights whose hash is not that of the published file")
    add("--bootstrap", type=NOT_NEGATIVE, default=0, help="draws for the error of a Frechet distance")
    add("--captions", type=Path, help="captions of the samples, one per line in their order (default: those they have)")
    add("--caption-prefix", default="A photo depicts", help="before every caption, for clipscore; '' for none")
    add("--batch-size", type=POSITIVE, default=64, help="images per call of the extractor")


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.benchmark:
        yield Unread(
            "with --benchmark",
            ("--metrics", "--record-routing", "--shards", "--images", "--device", *_MODELS, *_SHEETS),
        )
    elif arguments.metrics:
        yield Unread("with --metrics", ("--record-routing", *_MODELS, *_SHEETS))
    elif arguments.record_routing:
        yield Unread("with --record-routing", ("--names", "--out", *_SHEETS))
    if not arguments.metrics:
        yield Unread("without --metrics", _SAMPLES)


def _act(arguments: argparse.Namespace) -> None:
    check_folder(arguments.out)
    if arguments.benchmark:
        _read_results(arguments)
    elif arguments.metrics:
        _judge(arguments)
    elif arguments.record_routing:
        _record(arguments)
    else:
        _compare(arguments)


def _read_results(arguments: argparse.Namespace) -> None:
    paths = [Path(path) for path in arguments.models]
    names = arguments.names or result_names(paths)
    _write_figures([read_result(arguments.benchmark, path) for path in paths], names, arguments.out)


def _judge(arguments: argparse.Namespace) -> None:
    settings = MetricSettings(
        metrics=arguments.metrics,
        batch_size=arguments.batch_size,
        images=arguments.images,
        bootstrap=arguments.bootstrap,
        captions=arguments.captions,
        caption_prefix=arguments.caption_prefix,
        pairs=arguments.shards,
    )
    extractor = ExtractorOptions(
        arguments.extractor, arguments.extractor_weights, arguments.unverified, arguments.device
    )
    found = judge_sets(arguments.models, arguments.reference, extractor, settings, arguments.names)
    _write_figures(found, [figures.samples for figures in found], arguments.out)


def _write_figures(found: list[SampleFigures], names: list[str], folder: Path) -> None:
    """Print a table of figures, a column each, and write each with its protocol."""
    if len(set(names)) != len(found):
        raise ConfigError(f"--names: {len(found)} files need as many different names, got {', '.join(names)}")
    found = [replace(figures, samples=name) for figures, name in zip(found, names, strict=True)]
    print(figures_table(found))
    for figures in found:
        print(f"written: {figures.save(folder / f'{slug(figures.samples)}.figures.json')}")


def _record(arguments: argparse.Namespace) -> None:
    if len(arguments.models) != 1:
        raise ConfigError(f"--record-routing records one model, got {len(arguments.models)}; call it once for each")
    saved = find_saved_model(Path(arguments.models[0]), arguments.weights)
    shards = held_out_shards([saved], arguments.shards, arguments.split)
    model, _ = load_model(saved.weights)
    check_held_out(model.config, shards, arguments.images or 128)
    record = record_routing(
        placed(model, arguments),
        shards,
        name=saved.name,
        images=arguments.images or 128,
        chunk=arguments.chunk,
        seed=arguments.seed,
    )
    print(f"written: {record.save(arguments.record_routing)} ({record.title})")


def _compare(arguments: argparse.Namespace) -> None:
    models = [find_saved_model(Path(path), arguments.weights) for path in arguments.models]
    shards = held_out_shards(models, arguments.shards, arguments.split)
    settings = ComparisonSettings(
        images=arguments.images or 128,
        chunk=arguments.chunk,
        sheet_images=arguments.sheet_images,
        sheet_blocks=tuple(arguments.sheet_blocks),
        seed=arguments.seed,
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
    )
    found = compare_models(models, arguments.names, shards, settings)
    print(allocation_table(found.allocations))
    for saved in models:
        print_note(average_note(saved))
    print(f"written: {write_comparison(arguments.out, found, arguments.sheet_scale)}")


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
