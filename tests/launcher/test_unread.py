"""Options that a way of calling a command does not read are refused, where they would be ignored silently."""

import importlib
from pathlib import Path

import pytest

from launcher.command import Command
from launcher.main import main
from sharpmoe.model.weights import save_weights
from tests.toys import toy_model

# words, with @ for a folder with weights -> what the line says
IGNORED: list[tuple[str, str]] = [
    ("evaluate a.npz --metrics fd --reference b.npz --dtype bfloat16", "--dtype has no effect with --metrics"),
    ("evaluate a.npz --metrics fd --chunk 4 --split unseen", "--split, --chunk have no effect with --metrics"),
    ("evaluate r.jsonl --benchmark geneval --device cpu", "--device has no effect with --benchmark"),
    ("evaluate r.jsonl --benchmark geneval --metrics fd", "--metrics has no effect with --benchmark"),
    ("evaluate runs/a --reference b.npz", "--reference has no effect without --metrics"),
    ("evaluate runs/a --record-routing r.json --out here", "--out has no effect with --record-routing"),
    ("sample runs/a --num 5", "--num has no effect without --npz"),
    ("sample runs/a --join 5", "--join has no effect without --npz"),
    ("sample runs/a --npz a.npz --pool-per-image", "--pool-per-image has no effect with --npz"),
    ("sample runs/a --npz a.npz --out here --film", "--out, --film have no effect with --npz"),
    ("sample runs/a --npz a.npz --width 64", "--width has no effect with --npz, which draws the square of the model"),
    ("sample runs/a --npz a.npz --join 2 --part 1/2", "--part has no effect with --join"),
    ("prepare --encoder hash --join features", "--join has no effect with one text encoder"),
    ("sample runs/a --captions cat --per-prompt 2", "--per-prompt has no effect without --prompts"),
    ("sample runs/a --film --part 1/2", "--part has no effect with --film, which draws one picture"),
    ("plan --replay r.json --world 4 --zero 2", "--world, --zero have no effect with --replay"),
    ("train --world 4", "--world has no effect without --dry-run"),
    ("convert runs/a b --to promoe --router ec --top-k 2", "--router, --top-k have no effect with --to"),
    ("convert a.pth b --shards data/a", "--shards has no effect without --config"),
    ("convert nucleus b --family nucleus --text-width 8", "--text-width has no effect with --family nucleus"),
    ("convert nucleus b --family nucleus --weights ema", "--weights has no effect with --family nucleus"),
    ("export runs/a b --adapters --dtype float16", "--dtype has no effect with --adapters"),
    ("identify a.pth --split test", "--split has no effect without --shards"),
    ("ablate s.yaml --report-only --only plain", "--only has no effect with --report-only"),
    ("submit --job prepare --device-memory 80", "--device-memory has no effect with --job prepare"),
    ("prepare --codec pixel --pca-patch 2", "--pca-patch has no effect with --codec pixel"),
    ("prepare --codec-name vae", "--codec-name has no effect with --codec patch_pca"),
    ("prepare --codec autoencoder_kl --pca-whiten 0", "--pca-whiten has no effect with --codec autoencoder_kl"),
    ("prepare --source a --like @/toy.safetensors --codec pixel", "--codec has no effect with --like"),
    ("prepare --source a --like @/toy.safetensors --max-length 8", "--max-length has no effect with --like"),
    (
        "prepare --source a --codec-from @/toy.safetensors --codec-name b",
        "--codec-name has no effect with --codec-from",
    ),
    ("prepare --source a --class-folders --moments m --codec pixel", "--codec has no effect with --moments"),
    ("prepare --source a --flip", "--flip has no effect without --class-folders"),
    ("prepare --source a --tarball b.tgz", "--tarball has no effect with --source"),
    ("prepare --class-folders", "--class-folders has no effect without --source FOLDER"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unread")
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(root / "toy.safetensors", model.state_dict(), model.config)
    return root


@pytest.mark.parametrize(("words", "said"), IGNORED)
def test_an_option_that_would_be_ignored_is_refused(
    place: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.replace("@", str(place)).split()) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"error: {said}")
    assert line.endswith(("; leave it out\n", "; leave them out\n"))


@pytest.mark.parametrize("words", [words for words, _ in IGNORED])
def test_the_options_that_are_refused_are_options_of_the_command(place: Path, words: str) -> None:
    name, *rest = words.replace("@", str(place)).split()
    command: Command = importlib.import_module(f"launcher.{name}").main
    parser = command.parser()
    known, _ = parser.parse_known_args(rest)
    named = {option for unread in command.unread(known) for option in unread.options}
    assert named
    assert named <= set(parser._option_string_actions)
