"""Train and measure the arms of a study and compare them: `python launcher/ablate.py configs/studies/fashion.yaml`.

Every arm is trained with every seed on equally many noisy images and measured alike; the table (Markdown, JSON,
curves) gives means and paired differences to the control with intervals (docs/studies.md). A killed study goes on where
it was. Exit codes: 0, also where --time-limit stopped it; 1 where a part failed; 130 and 143 after Ctrl-C and SIGTERM.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from collections.abc import Iterator
from pathlib import Path

from launcher.bounds import NOT_NEGATIVE, POSITIVE, POSITIVE_REAL
from launcher.command import OVERRIDES_HELP, Command, Unread
from launcher.devices import DEVICE_HELP, device_name
from sharpmoe.errors import ConfigError
from sharpmoe.study.conduct import Wish, conduct, rehearse_study
from sharpmoe.study.measure import measure_part, prepare_judging
from sharpmoe.study.plan import Study, load_study
from sharpmoe.study.results import write_results

_FAILED = 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="study file, such as configs/studies/fashion.yaml")
    add("--name", help="name of the study's folder (default: that of the file)")
    add("--only", nargs="+", default=(), metavar="ARM", help="train and measure these arms alone")
    add("--final", action="store_true", help="measure on the final split, on which nothing is chosen")
    add("--parallel", type=POSITIVE, default=1, metavar="N", help="parts at a time, one CPU thread each")
    add("--time-limit", type=POSITIVE_REAL, metavar="MINUTES", help="stop after this long, saved; call again to go on")
    add("--report-only", action="store_true", help="write table, curves and sheets of what is measured; nothing else")
    add("--sheet-images", type=NOT_NEGATIVE, default=4, help="images on the routing sheets of the arms; 0 draws none")
    add("--dry-run", action="store_true", help="check every arm, list what is left and estimate its time")
    add("--device", type=device_name, default="auto", help=f"device of measuring: {DEVICE_HELP}")
    add("--job", metavar="judging|ARM/seedN", help="do one job of the study here: how it starts its own processes")


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.report_only:
        yield Unread("with --report-only", ("--only", "--parallel", "--time-limit", "--dry-run", "--device"))


def _act(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study, arguments.overrides, arguments.name)
    split = "final" if arguments.final else "tuning"
    if arguments.job is not None:
        _do(study, arguments.job, split, arguments.device)
        return 0
    wish = Wish(
        split=split,
        only=tuple(arguments.only),
        parallel=arguments.parallel,
        minutes=arguments.time_limit,
        sheet_images=arguments.sheet_images,
        words=_words(arguments),
    )
    if arguments.dry_run:
        print(rehearse_study(study, wish, arguments.device))
        return 0
    if arguments.report_only:
        return _report(study, split, arguments.sheet_images)
    outcome = conduct(study, wish, _say)
    _show(study.folder / f"{split}.md")
    if outcome.left:
        print(f"{len(outcome.left)} jobs are left; the same command goes on")
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    return _FAILED if outcome.failed else 0


def _report(study: Study, split: str, sheet_images: int) -> int:
    """Write the results of what is on the disk; a study that runs is not disturbed."""
    path = write_results(study, split, sheet_images, _say)
    if path is None:
        raise ConfigError(f"{study.folder}: nothing is measured on the {split} split yet; run without --report-only")
    _show(path)
    return 0


def _show(table: Path) -> None:
    if table.is_file():
        print(table.read_text(encoding="utf-8"), f"written: {table}", sep="\n")


def _say(line: str) -> None:
    print(line, flush=True)


def _do(study: Study, job: str, split: str, device: str) -> None:
    if job == "judging":
        prepare_judging(study, split, device)
    else:
        print(f"written: {measure_part(study, study.part(job), split, device)}")


def _words(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the words with which a job reads the same study."""
    named = ("--name", arguments.name) if arguments.name else ()
    final = ("--final",) if arguments.final else ()
    return (str(arguments.study), *named, *final, "--device", arguments.device, *arguments.overrides)


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread, overrides=True, epilog=OVERRIDES_HELP)

if __name__ == "__main__":
    main.run()
