"""Exported folders: diffusers draws what `sharpmoe.sample` draws, and `sharpmoe.load` reads the same bits."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sharpmoe
from data_pipeline.encode.like import origin_header
from launcher.export import main as export
from launcher.identify import main as identify
from launcher.sample import main as sample
from sharpmoe import draws
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.published.export import PipelineExtras, write_pipeline_folder
from sharpmoe.model.published.own import CODE_FILES, own_folder
from sharpmoe.model.weights import StartingWeights, WeightsFile, read_weights, save_weights
from sharpmoe.report.samples import Prompts, encode_prompts
from tests.report.run_folder import make_run_folder
from tests.toys import toy_model

diffusers = pytest.importorskip("diffusers")
hub = pytest.importorskip("sharpmoe.hub")

WORDS = ["a red circle", "a blue square"]


@pytest.fixture(autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies the code files of a folder."""
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "toy-text"
    assert export([str(run_folder), str(out), "--to", "diffusers"]) == 0
    return out


def pipeline(folder: Path, **options: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True, **options
    )


def same_bits(one: Backbone, other: Any) -> bool:
    there = other.state_dict()
    return one.state_dict().keys() == there.keys() and all(
        torch.equal(value, there[name]) for name, value in one.state_dict().items()
    )


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_a_pipeline_draws_what_sharpmoe_draws(exported: Path, run_folder: Path) -> None:
    model, pipe = sharpmoe.load(run_folder), pipeline(exported)
    assert type(pipe) is hub.SharpMoEPipeline
    assert same_bits(model, pipe.transformer)
    assert same_bits(model, sharpmoe.load(exported))
    assert sharpmoe.load(exported).origin == model.origin
    settings: dict[str, Any] = {"cfg_interval": (0.2, 0.9), "cfg_norm": "tokens", "method": "heun"}
    own = sharpmoe.sample(model, WORDS, num_steps=3, cfg_scale=2.5, seed=7, **settings)
    drawn = pipe(WORDS, num_inference_steps=3, guidance_scale=2.5, seed=7, **settings)
    assert np.array_equal(pixels(own), pixels(drawn.images))
    # Defaults are those of the run: two steps.
    assert np.array_equal(pixels(sharpmoe.sample(model, WORDS[0], num_steps=2)), pixels(pipe(WORDS[0]).images))


def test_every_step_reads_the_clean_prediction_of_the_one_before(exported: Path) -> None:
    pipe = pipeline(exported)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def watched(module: Backbone, inputs: tuple[Any, ...], output: Any) -> None:
        x_t, t, _, x0_prev, *_ = inputs
        calls.append((x_t, t[:, None, None, None], x0_prev, output.v))

    with pipe.transformer.backbone.register_forward_hook(watched):
        pipe(WORDS[0], num_inference_steps=3, guidance_scale=1.0)
    assert len(calls) == 3
    assert torch.equal(calls[0][2], calls[0][0])  # the noise
    for (x_t, t, _, v), (_, _, x0_prev, _) in pairwise(calls):
        torch.testing.assert_close(x0_prev, x_t - t * v)
    changed = pipe.transformer.backbone(calls[1][0], calls[1][1].flatten(), text_of(pipe), calls[0][0]).v
    assert not torch.allclose(changed, calls[1][3])  # the routers do read it


def text_of(pipe: Any) -> Any:
    return encode_prompts(pipe.transformer.backbone.config, pipe._origin(), Prompts((WORDS[0],))).cond


def test_noise_sizes_and_types_of_a_pipeline(exported: Path) -> None:
    pipe = pipeline(exported)
    config = pipe.transformer.backbone.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    noise = draws.noise(5, range(2), shape, draws.Purpose.SAMPLE_NOISE)
    by_seed = pipe(WORDS, seed=5, output_type="pt").images
    assert torch.equal(pipe(WORDS, latents=noise, output_type="pt").images, by_seed)
    one_by_one = [pipe(WORDS, batch_size=1, output_type="pt", **own) for own in ({"seed": 5}, {"latents": noise})]
    assert torch.equal(*(drawn.images for drawn in one_by_one))
    (array,) = pipe(WORDS, seed=5, output_type="np", return_dict=False)
    np.testing.assert_allclose(array, (by_seed.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    assert pipe(WORDS, seed=5, output_type="latent").images.shape == (2, *shape)
    drawn = [pipe(WORDS[0], generator=torch.Generator().manual_seed(3), output_type="pt").images for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], by_seed[:1])
    several = pipe(WORDS[0], num_images_per_prompt=3, height=32, width=64).images
    assert [image.size for image in several] == [(64, 32)] * 3
    assert pixels(several[:1]).tolist() != pixels(several[1:2]).tolist()
    for wrong, message in (
        ({"latents": noise[:1]}, "expected"),
        ({"output_type": "jpg"}, "expected pil, np, pt or latent"),
        ({"height": 33}, "not a multiple"),
        ({"steps": 3}, r"sample\.steps: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe(WORDS, **wrong)
    with pytest.raises(ConfigError, match="got label 3; give captions"):
        pipe(3)


def test_a_class_conditional_model_draws_labels(tmp_path: Path, run_folder: Path) -> None:
    model = toy_model("ec", conditioning="class", num_classes=5, latent_size=8)
    shards = sharpmoe.open_shards(run_folder.parent / "shards")
    model.origin = origin_header(shards)
    weights = sharpmoe.save(model, tmp_path / "classes.safetensors")
    out = tmp_path / "out"
    assert export([str(weights), str(out), "--to", "pipeline"]) == 0
    pipe = pipeline(out)
    own = sharpmoe.sample(model, [0, 4], num_steps=2, cfg_scale=2.0)
    assert np.array_equal(pixels(own), pixels(pipe([0, 4], num_inference_steps=2, guidance_scale=2.0).images))
    with pytest.raises(ConfigError, match="label 5, the model has classes 0 to 4"):
        pipe([5])
    card = (out / "README.md").read_text()
    assert "pipeline_tag" not in card
    assert card.count("not recorded") > 3  # a file alone says nothing of its run


def test_half_precision_keeps_buffers(exported: Path) -> None:
    pipe = pipeline(exported, dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in pipe.transformer.state_dict().items()}
    buffers = {name for name, _ in pipe.transformer.named_buffers()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == buffers
    assert pipe(WORDS[0], output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_that_is_cast_keeps_its_buffers(exported: Path, dtype: torch.dtype) -> None:
    pipe = pipeline(exported)
    before = {name: buffer.clone() for name, buffer in pipe.transformer.named_buffers()}
    pipe.transformer.to(dtype)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {dtype}
    assert {parameter.dtype for parameter in pipe.transformer.backbone.parameters()} == {dtype}
    for name, buffer in pipe.transformer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_saved_pipeline_loads_again(exported: Path, tmp_path: Path) -> None:
    pipe = pipeline(exported, places={"nothing": "elsewhere"})
    pipe.save_pretrained(tmp_path / "again")
    again = pipeline(tmp_path / "again")
    assert same_bits(pipe.transformer.backbone, sharpmoe.load(tmp_path / "again"))
    assert np.array_equal(pixels(pipe(WORDS).images), pixels(again(WORDS).images))


@pytest.mark.parametrize("largest", [10**9, 20_000])
def test_weights_in_one_file_and_in_several(run_folder: Path, tmp_path: Path, largest: int) -> None:
    source = WeightsFile(run_folder / "checkpoints" / "step00000002" / "live.safetensors")
    extras = PipelineExtras(card="", origin={}, sample={})
    files = write_pipeline_folder(tmp_path / "out", source, torch.float32, extras, largest)
    assert all(file.is_file() for file in files)
    several = sum(file.suffix == ".safetensors" for file in files) > 1
    assert several == (largest == 20_000)
    model = sharpmoe.load(run_folder, weights="live")
    assert same_bits(model, pipeline(tmp_path / "out").transformer)
    assert same_bits(model, sharpmoe.load(tmp_path / "out"))
    start = StartingWeights(model.config, 0, tmp_path / "out")  # as checkpoint.init
    assert all(torch.equal(start(name, value.shape), value) for name, value in model.state_dict().items())
    name = "blocks.1.moe.experts.w1"
    assert torch.equal(
        start(name, (2, *model.state_dict()[name].shape[1:]), range(1, 3)), model.state_dict()[name][1:3]
    )
    if not several:  # a single file is a weights file
        assert same_bits(model, sharpmoe.load(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"))


def test_commands_read_the_folder(
    exported: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(run_folder.parent / "shards")
    words = ["--captions", *WORDS, "--shards", shards, "--steps", "2", "--device", "cpu"]
    for number, place in enumerate((exported, run_folder)):
        assert sample([str(place), *words, "--out", str(tmp_path / str(number)), "--cfg-scale", "1.5"]) == 0
    one, other = (sorted((tmp_path / str(number)).glob("*.png")) for number in (0, 1))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert identify([str(exported)]) == 2
    assert "is a model that this project has exported; sharpmoe.load" in capsys.readouterr().err
    assert export([str(exported), str(tmp_path / "file.safetensors")]) == 0
    assert same_bits(sharpmoe.load(exported), sharpmoe.load(tmp_path / "file.safetensors"))


def test_what_does_not_fit_is_one_line(
    exported: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(run_folder), str(exported), "--to", "diffusers"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    model = toy_model()
    state = {name: value for name, value in model.state_dict().items() if "saliency_router" not in name}
    save_weights(tmp_path / "less.safetensors", state, model.config)
    assert export([str(tmp_path / "less.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert "saliency_router" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken" / "transformer"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text(json.dumps({"_class_name": "SharpMoETransformer", "model": {"width": 3}}))
    assert own_folder(broken.parent) == broken
    with pytest.raises(CheckpointError, match="an architecture that cannot be read; export it again"):
        read_weights(broken)
    save_weights(tmp_path / "alone.safetensors", model.state_dict(), model.config)
    assert export([str(tmp_path / "alone.safetensors"), str(tmp_path / "alone"), "--to", "diffusers"]) == 0
    with pytest.raises(ConfigError, match="does not say with which codec it was trained"):
        pipeline(tmp_path / "alone")(WORDS)


@pytest.mark.parametrize("name", CODE_FILES)
def test_without_the_package_the_code_of_a_folder_says_what_is_missing(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (exported / name).read_text()
    assert "SharpMoE" in text
    monkeypatch.setitem(sys.modules, "sharpmoe.hub", None)
    with pytest.raises(ImportError, match="needs the packages sharpmoe and diffusers .* install sharpmoe") as error:
        exec(compile(text, name, "exec"), {})  # noqa: S102
    assert "\n" not in str(error.value)


def test_networks_that_are_named_may_be_elsewhere(exported: Path, tmp_path: Path) -> None:
    """The codec and the encoders of a model are loaded from where the user has them."""
    named = {"kind": "joined", "encoders": [{"kind": "transformers", "name": "a"}, {"kind": "hash", "width": 8}]}
    assert hub._moved(named, {"a": "/data/b"})["encoders"][0] == {"kind": "transformers", "name": "/data/b"}
    folder = tmp_path / "moved"
    pipeline(exported).save_pretrained(folder)
    place = folder / "transformer" / "config.json"
    content = json.loads(place.read_text())
    content["meta"]["encoder"] = json.dumps({"kind": "transformers", "name": str(tmp_path / "gone"), "max_length": 8})
    place.write_text(json.dumps(content))
    with pytest.raises(DataError, match=str(tmp_path / "gone")):
        pipeline(folder)(WORDS)
    with pytest.raises(DataError, match=str(tmp_path / "there")):
        pipeline(folder, places={str(tmp_path / "gone"): str(tmp_path / "there")})(WORDS)


@pytest.mark.parametrize("name", ["/home/me/vae", "models/vae"])
def test_absolute_paths_in_a_folder_to_publish_are_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_model()
    origin = {
        "codec": json.dumps({"kind": "autoencoder_kl", "name": name, "sha256": "0"}),
        "encoder": json.dumps({"kind": "joined", "encoders": [{"kind": "transformers", "name": name}]}),
    }
    save_weights(tmp_path / "own.safetensors", model.state_dict(), model.config, origin)
    assert export([str(tmp_path / "own.safetensors"), str(tmp_path / "out"), "--to", "pipeline"]) == 0
    told = capsys.readouterr().err
    if name.startswith("/"):
        assert told.startswith(f"warning: {tmp_path / 'out'}: its files show {name}, absolute paths of this machine")
        assert told.count("\n") == 1
    else:
        assert told == ""
    assert f"`{name}`" in (tmp_path / "out" / "README.md").read_text()


def test_clips_are_lists_of_frames(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path, toy_model("diffmoe", text_width=32, pooled_width=32, latent_frames=2))
    assert export([str(run), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    pipe, given = pipeline(tmp_path / "out"), {"num_inference_steps": 2, "seed": 1}
    clips = pipe(WORDS, **given).images
    expected = sharpmoe.sample(sharpmoe.load(run), WORDS, num_steps=2, seed=1)
    assert [len(clip) for clip in clips] == [2, 2]
    for clip, frames in zip(clips, expected, strict=True):
        assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(clip, frames, strict=True))
    shapes = {kind: tuple(pipe(WORDS, **given, output_type=kind).images.shape) for kind in ("np", "pt", "latent")}
    assert shapes == {"np": (2, 2, 32, 32, 3), "pt": (2, 3, 2, 32, 32), "latent": (2, 4, 2, 8, 8)}
    with pytest.raises(ConfigError, match=r"latents: shape .*, expected \(2, 4, 2, 8, 8\)"):
        pipe(WORDS, latents=torch.zeros(2, 4, 8, 8))
