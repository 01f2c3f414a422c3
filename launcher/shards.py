"""Inspect and merge prepared shards: `python launcher/shards.py verify|stats|show|merge ...`.

FOLDER may be a URL (http, https, s3, gs).
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import json
from pathlib import Path

from data_pipeline.encode.saliency import saliency_line
from data_pipeline.prepare.merge import merge_folders
from data_pipeline.read.folder import read_index
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stats import folder_report, sample_stats, some_samples
from data_pipeline.read.verify import verify_folder
from data_pipeline.store.store import open_store
from launcher.bounds import POSITIVE, png_file
from launcher.command import Command
from sharpmoe.console import progress_bar
from sharpmoe.report.contact import contact_sheet, sample_cards
from sharpmoe.report.figures import save_png


def _act(arguments: argparse.Namespace) -> int:
    """Return 1 where verify has found damage."""
    return int(arguments.act(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.folder)
    index, _ = read_index(store)
    total = sum(shard.size for shard in index.shards)
    with progress_bar("verifying", total, "B", quiet=arguments.quiet) as advance:
        checked = verify_folder(store, index, advance, arguments.threads)
    for damage in checked.damage:
        print(json.dumps(damage._asdict(), ensure_ascii=False) if arguments.json else f"damaged: {damage}")
    state = f"{checked.num_bad} samples damaged" if checked.damage else "all sound"
    print(f"{store.location}: {checked.shards} shards, {checked.samples} samples, {checked.size} bytes: {state}")
    return int(bool(checked.damage))


def _stats(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.folder)
    index, _ = read_index(store)
    opened = {split: ShardSet.open(arguments.folder, split) for split, count in index.splits.items() if count}
    stats = {split: sample_stats(some_samples(shards, arguments.samples)) for split, shards in opened.items()}
    print(folder_report(store.location, index, stats))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    index, _ = read_index(open_store(arguments.folder))
    shards = ShardSet.open(arguments.folder, arguments.split or next(iter(index.splits)))
    title = f"{Path(shards.location).name} · {shards.split} · {shards.num_samples} samples"
    title += f" · M: {saliency_line(shards.saliency)}"
    sheet = contact_sheet(sample_cards(shards, arguments.count), title)
    print(save_png(sheet, arguments.out))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    stores = [open_store(folder) for folder in arguments.folders]
    total = sum(shard.size for store in stores for shard in read_index(store)[0].shards)
    with progress_bar("merging", total, "B", quiet=arguments.quiet) as advance:
        index = merge_folders(stores, arguments.out, arguments.link, advance)
    splits = ", ".join(f"{name} {count}" for name, count in index.splits.items())
    print(f"{arguments.out}: {len(index.shards)} shards: {splits}")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="verify|stats|show|merge")

    def add_parser(name: str, text: str) -> argparse.ArgumentParser:
        described = f"{text[0].upper()}{text[1:]}."
        return commands.add_parser(name, help=text, description=described, formatter_class=parser.formatter_class)

    check = add_parser("verify", "recompute every checksum and decode every sample; exit code 1 where any is damaged")
    check.set_defaults(act=_verify)
    check.add_argument("folder", help="prepared folder or URL")
    check.add_argument("--threads", type=POSITIVE, default=4, help="shards read in parallel (default: 4)")
    check.add_argument("--json", action="store_true", help="print damage as JSON, one object per line")
    stats = add_parser("stats", "print counts, buckets, sizes, and statistics of some samples")
    stats.set_defaults(act=_stats)
    stats.add_argument("folder", help="prepared folder or URL")
    stats.add_argument("--samples", type=POSITIVE, default=256, help="samples read in every split (default: 256)")
    show = add_parser("show", "draw a contact sheet of some samples with captions and saliency")
    show.set_defaults(act=_show)
    show.add_argument("folder", help="prepared folder or URL")
    show.add_argument("--split", help="split (default: the first)")
    show.add_argument("--count", type=POSITIVE, default=24, help="samples (default: 24)")
    show.add_argument("--out", type=png_file, default=Path("contact.png"), help="PNG file (default: contact.png)")
    join = add_parser("merge", "merge several folders into one")
    join.set_defaults(act=_merge)
    join.add_argument("out", type=Path, help="new folder")
    join.add_argument("folders", nargs="+", help="prepared folders or URLs")
    join.add_argument("--link", action="store_true", help="hard links instead of copies; the tars are not read")
    for command in (check, join):
        command.add_argument("--quiet", action="store_true", help="no progress bar")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
