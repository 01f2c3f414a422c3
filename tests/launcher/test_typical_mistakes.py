"""Mistakes that users make: each is one line that says how to fix it, exit code 2, and no traceback."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launcher.main import main
from sharpmoe import durable
from sharpmoe.model.weights import save_weights
from tests.report.run_folder import make_run_folder
from tests.toys import toy_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its shards, weights, a folder of pictures, and the files that go wrong."""
    root = tmp_path_factory.mktemp("mistakes")
    make_run_folder(root)
    model = toy_model("ec", conditioning="class", num_classes=4)
    save_weights(root / "class.safetensors", model.state_dict(), model.config)
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(root / "few.safetensors", model.state_dict(), model.config)
    (root / "empty.pt").touch()
    (root / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (root / "page.pth").write_text("<!DOCTYPE html>\n<html>404</html>\n")
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, root / "complex.pt")
    torch.save({"x": torch.zeros(2).to_sparse()}, root / "sparse.pt")
    (root / "half.safetensors").write_bytes((root / "class.safetensors").read_bytes()[:1000])
    (root / "twice.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    (root / "tab.yaml").write_text("train:\n\tsteps: 1\n")
    (root / "file").touch()
    (root / "folder").mkdir()
    (root / "pictures").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "pictures" / "a.png")
    return root


# words, where @ is the folder of the fixture -> what the line says
MISTAKES: list[tuple[str, str]] = [
    # another trainer's names
    ("train --learning_rate 1e-4", "--learning_rate: unknown key; here it is: optim.lr"),
    ("train --batch-size 4", "here it is: train.global_batch (all ranks together)"),
    ("train --epochs 10", "here it is: train.steps (optimizer steps; an epoch is images / train.global_batch"),
    ("train --dryrun", "here it is: --dry-run (an option without a value)"),
    ("train --fp16", "here it is: train.precision bf16 (fp16 is not offered)"),
    ("train --lora_rank 8", "here it is: lora.rank"),
    ("train --output_dir out", "here it is: output (the folder of all runs) and name (the folder of this one)"),
    ("train --gradient_accumulation_steps 2", "here it is: train.micro_batch"),
    # keys and values
    ("train --learning_rat 1e-3", "did you mean learning_rate? here it is: optim.lr"),
    ("train --rollout.steps 3", "did you mean rollout.num_steps or"),
    ("train --train.stepz 3", "did you mean train.steps?"),
    ("train --train.steps", "--train.steps has no value; write --train.steps VALUE"),
    ("train --train.steps 0", "--train.steps: got 0, allowed: a whole number >= 1; change train.steps"),
    ("train --train.steps 1:30", "got '1:30', allowed: a whole number >= 1"),
    ("train --optim.lr inf", "got 'inf', allowed: a finite number > 0"),
    ("train --optim.betas 0.9", "got '0.9', allowed: a list of 2: a finite number >= 0 and < 1"),
    ("train --train.precision fp16", "got 'fp16', allowed: fp32 | bf16"),
    ("train --model.num_heads 5 --stage pretrain", "num_heads (5) must divide width (128)"),
    ("train optim.lr=1", "is not an override; write overrides as --section.key value"),
    ("train --config nowhere.yaml", "run file nowhere.yaml does not exist"),
    ("train --config @/twice.yaml", "line 3, column 3: key 'steps' is given twice"),
    ("train --config @/tab.yaml", "@/tab.yaml is not valid YAML: line 2, column 1"),
    ("train --deepspeed nowhere.json", "nowhere.json"),
    # a folder where a file is expected
    ("train --config @/folder", "run file @/folder is a folder, expected a YAML file; add a file name"),
    ("train --deepspeed @/folder", "DeepSpeed file @/folder is a folder, expected a JSON file; add a file name"),
    ("sample @/toy --captions-file @/folder", "@/folder: cannot be read as a caption file"),
    ("identify @/folder", "@/folder: holds no .safetensors"),
    # places and files
    ("sample nowhere", "nowhere: neither a run folder with checkpoints/latest nor a .safetensors file"),
    ("sample @/toy --out @/file", "@/file: is a file, or below one, expected a folder; choose another place"),
    ("sample @/half.safetensors --shards @/shards", "@/half.safetensors: not a sound safetensors file"),
    ("export @/toy @/folder", "@/folder: is a folder, expected a file; add a file name"),
    ("export @/toy @/file/x.safetensors", "@/file: "),
    ("evaluate @/toy --out @/file/x", "@/file: is a file, or below one, expected a folder"),
    ("shards show @/shards --out @/folder", "allowed: a file whose name ends in .png"),
    ("shards verify nowhere", "nowhere: no index.json"),
    ("report nowhere", "nowhere"),
    (
        "train --data.shards nowhere",
        "--source FOLDER]`, which also finishes what an earlier run began, or name the place",
    ),
    (
        "train --data.shards @/shards --output /proc/x",
        "output: /proc/x/quickstart cannot be made: /proc cannot be written",
    ),
    ("sample @/toy --out /proc/x", "/proc: permission denied; choose another place"),
    ("prepare --source nowhere --out @/out", "nowhere: no such folder"),
    ("convert @/class.safetensors @/o.safetensors", "is a weights file of this project already; sharpmoe.load"),
    ("convert @/class.safetensors @/folder --to promoe", "@/folder: is a folder, expected a file"),
    ("convert @/empty.pt @/o.safetensors", "@/empty.pt: is empty, as a broken download leaves it; download it again"),
    ("convert @/pointer.pt @/o.safetensors", "is a pointer of Git LFS, not the file itself; fetch it with `git lfs"),
    ("convert @/page.pth @/o.safetensors", "is a web page, not a checkpoint; download the file itself"),
    (
        "convert @/complex.pt @/o.safetensors",
        "x is a tensor torch.complex64, expected real numbers; save it as float32",
    ),
    ("convert @/sparse.pt @/o.safetensors", "key x_embedder.proj.weight is missing: not a diffusion transformer"),
    ("identify @/half.safetensors", "@/half.safetensors: cannot be read as tensors only"),
    # devices, counts, words
    ("sample @/toy --device gpu", "--device: got 'gpu', allowed: auto (cuda where there is one, else cpu), cpu"),
    ("sample @/toy --device cuda:99", "--device: got 'cuda:99', but torch finds cpu"),
    ("sample @/toy --batch-size 0", "--batch-size: got '0', allowed: a whole number >= 1"),
    ("sample @/toy --labels 1", "captions"),
    ("sample @/class.safetensors --shards @/shards --captions x", "give --labels, not captions"),
    ("sample @/class.safetensors --shards @/shards --labels 0 4", "label 4, the model has classes 0 to 3"),
    (
        "sample @/few.safetensors --shards @/shards --labels 0 --fps 4",
        "--fps is of animations, and the model draws still",
    ),
    ("evaluate @/few.safetensors --shards @/shards", "has label 3, model.num_classes is 3 (labels 0 to 2); name the"),
    ("evaluate @/toy @/few.safetensors --shards @/shards", "has label 3, model.num_classes is 3 (labels 0 to 2); na"),
    ("evaluate @/few.safetensors --shards @/shards --record-routing @/r.json", "has label 3, model.num_classes is 3"),
    ("evaluate @/toy --image 8 --chunk 0", "--chunk: got '0', allowed: a whole number >= 1"),
    ("prepare --source @/pictures --out @/out --threads 0", "--threads: got '0', allowed: a whole number >= 1"),
    ("plan --worlds 8", "--worlds: unknown key; here it is: the launcher decides"),
    ("submit --time abc --dry-run", "--time 'abc': expected MINUTES"),
    ("hostfile --slots 0", "--slots: got '0', allowed: a whole number >= 1"),
    ("convert --familly sit @/empty.pt @/o", "did you mean --family?"),
    ("trian --train.steps 3", "did you mean train?"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_fix(
    words: str, line: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(words.replace("@", str(place)).split()) == 2
    said = capfd.readouterr().err
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, said
    assert line.replace("@", str(place)) in errors[0]
    assert "Traceback" not in said
    assert "usage:" not in said
    assert "measuring" not in said


# Commands that write files through `durable`, and the file that each begins with.
WRITING = [
    ("sample @/toy --shards @/shards --steps 1 --captions x --out @/full", "@/full/000_x.png"),
    ("export @/toy @/full/x.safetensors", "@/full/x.safetensors"),
    ("evaluate @/toy --images 1 --sheet-images 0 --out @/full", "@/full/"),
    ("shards show @/shards --out @/full/a.png", "@/full/a.png"),
    ("convert @/class.safetensors @/full/x.safetensors --to promoe", "@/full/x.safetensors"),
]


@pytest.mark.parametrize(("words", "file"), WRITING, ids=[words for words, _ in WRITING])
def test_a_full_disk_is_one_line_that_names_the_file(
    words: str, file: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "flush_file", flush)
    assert main(words.replace("@", str(place)).split()) == 2
    (line,) = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert line.startswith(f"error: {file.replace('@', str(place))}")
    assert line.endswith(": no space left on this disk; free some, or choose another place")
    assert not [path for path in place.glob("full/*") if path.is_file()]  # no draft either
