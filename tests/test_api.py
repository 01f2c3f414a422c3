"""The Python interface: light to import, the trainer's numbers, models that remember codec and encoder."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from setuptools.config.pyprojecttoml import read_configuration
from torch import Tensor

import sharpmoe
from data_pipeline.encode.like import FITTED_KEY, origin_header
from data_pipeline.read.shards import ShardSet
from data_pipeline.schema import Batch
from sharpmoe import draws
from sharpmoe.checkpoint.manifest import Cutoffs
from sharpmoe.config import LossConfig, ModelConfig, RolloutConfig, RunConfig, SampleConfig
from sharpmoe.errors import CheckpointError, ConfigError, DataError, SharpMoEError
from sharpmoe.model.backbone import Backbone, ClassCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import save_weights
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.report.samples import DrawOptions, Prompts, draw_to_files
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import train_step
from tests.distributed import run_ranks
from tests.parallel.reference import items_of, watched
from tests.report.run_folder import make_run_folder
from tests.toys import toy_model
from tests.train.setting import make_run, plan_for, stirred_model

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "deepspeed", "transformers", "diffusers", "pydantic", "numpy", "matplotlib")
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "checkpoint"},
    {"schedule": "two_pass"},
    {"schedule": "two_pass", "merged_steps": 2},
    {"schedule": "hybrid", "kept_steps": 1},
]


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_the_package_imports_nothing_and_using_it_no_deepspeed() -> None:
    code = (
        f"import sys; before = set(sys.modules); import sharpmoe; dir(sharpmoe); heavy = {HEAVY}\n"
        "found = [name for name in sys.modules.keys() - before if name.split('.')[0] in heavy]\n"
        "assert not found, found\n"
        "for name in sharpmoe.__all__: name == 'train_run' or getattr(sharpmoe, name)\n"
        "found = [name for name in ('deepspeed', 'transformers', 'diffusers', 'megatron') if name in sys.modules]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_dir_lists_is_what_there_is() -> None:
    assert dir(sharpmoe) == sorted(sharpmoe.__all__)
    assert all(getattr(sharpmoe, name).__doc__ for name in sharpmoe.__all__)
    stub = ast.parse((ROOT / "sharpmoe" / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed | {"__version__"} == set(sharpmoe.__all__)
    with pytest.raises(AttributeError, match="module 'sharpmoe' has no attribute 'nothing'"):
        sharpmoe.nothing  # noqa: B018


def test_the_version_has_one_home() -> None:
    project = read_configuration(ROOT / "pyproject.toml", expand=True, ignore_option_errors=True)["project"]
    assert project["version"] == sharpmoe.__version__


# --- the loss ---------------------------------------------------------------------------------------------------------


_OTHERS = [("ec", "trajectory"), ("dsmoe", "step")]


class Taken(NamedTuple):
    """What one step of the trainer gave: loss parts, gradients before clipping, and the moved buffers."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    cutoffs: Cutoffs


def one_trained_step(world: World, run: RunConfig) -> Taken:
    plan, gradients = plan_for(run, world), dict[str, Tensor]()
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    (items,) = items_of(plan, world, 1)
    watching = watched(engine, objective, gradients)
    result = train_step(watching, objective, ShardEma(engine, 0.9), items, 0, with_routing=False)
    buffers = {name: value.clone() for name, value in objective.model.named_buffers()}
    return Taken(result.losses, gradients, buffers, result.cutoffs)


@pytest.mark.dist
@pytest.mark.parametrize(("router", "pool"), [("diffmoe", "step"), ("diffmoe", "trajectory"), *_OTHERS])
def test_the_loss_of_a_step_is_that_of_the_trainer(router: str, pool: str, shards: Path, tmp_path: Path) -> None:
    model_section = {"bias_balancing": True} if router == "dsmoe" else {}
    run = make_run(shards, tmp_path, router, model=model_section, rollout={"caption_dropout": 0.5, "pool": pool})
    (trained,) = run_ranks(one_trained_step, 1, run)
    model, data = stirred_model(run).train(), sharpmoe.open_shards(shards)
    found = []
    for _, batch in zip(range(2), sharpmoe.batches(data, 4, seed=run.seed), strict=False):
        settings = {"loss": run.loss, "rollout": run.rollout, "empty_text": data.empty_text(), "seed": run.seed}
        found.append(sharpmoe.rollout_loss(model, batch, **settings))
        (found[-1].total / 2).backward()
    for name, value in trained.losses.items():
        assert np.mean([getattr(each.parts, name).item() for each in found]) == value
    assert [each.total.item() for each in found] == [each.parts.total.item() for each in found]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, trained.gradients[name], rtol=1e-5, atol=1e-7)
    cutoffs = sharpmoe.finish_step(model, *found, optim=run.optim)
    with pytest.raises(ConfigError, match="cutoffs (are of rollout.pool: trajectory|have shape)"):
        sharpmoe.rollout_loss(model, batch, **settings, cutoffs=torch.zeros(1, 1))
    assert (cutoffs is None) == (not trained.cutoffs) == (pool == "step" or router != "diffmoe")
    if cutoffs is not None:
        torch.testing.assert_close(cutoffs.double(), torch.tensor(trained.cutoffs, dtype=torch.float64))
        later = sharpmoe.rollout_loss(model, batch, **settings, cutoffs=cutoffs)
        rounded = sharpmoe.rollout_loss(model, batch, **settings, cutoffs=cutoffs.float())
        assert later.parts.total.dtype == torch.float32
        assert later.parts == rounded.parts
        again = sharpmoe.finish_step(model, later, optim=run.optim, cutoffs=cutoffs)
        decay = run.optim.threshold_decay
        torch.testing.assert_close(again, decay * cutoffs + (1 - decay) * later.cutoffs)
        return
    moved = dict(model.named_buffers())
    assert [name for name, value in trained.buffers.items() if not torch.equal(value, moved[name])] == []


def test_the_loss_is_the_papers_formula_in_float64() -> None:
    config = ModelConfig(
        router="ec", width=16, depth=2, num_heads=2, latent_size=4, num_experts=2, conditioning="class"
    )
    torch.manual_seed(0)
    model = build_model(config).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x0, x1, saliency = torch.randn(3, 4, 4, 4).double(), torch.randn(3, 4, 4, 4).double(), torch.rand(3, 4).double()
    times, labels = torch.tensor([[0.9] * 3, [0.5] * 3, [0.1] * 3], dtype=torch.float64), torch.tensor([1, 5, 7])
    settings = LossConfig(routing_weight=0.7, routing_mass="scores", mass_reduction="sum", mass_scale=2.0)

    expected, mass, x0_prev = torch.zeros(()).double(), torch.zeros(3, 4).double(), 0.1 * x0 + 0.9 * x1
    for t in times:
        at = t[:, None, None, None]
        x_t = (1 - at) * x0 + at * x1
        v, routing = model(x_t, t, labels, x0_prev)
        expected = expected + ((v - (x1 - x0)) ** 2).mean() / 3
        mass = mass + sum(layer.gates.sum(-1) for layer in routing)
        x0_prev = (x_t - at * v).detach()
    p, q = (2 * mass).softmax(-1), (settings.saliency_scale * saliency).softmax(-1)
    expected = expected + 0.7 * (p * (p / q).log()).sum(-1).mean()

    batch = TrajectoryBatch(x0, x1, times, ClassCondition(labels), saliency)
    found = sharpmoe.rollout_loss(model, batch, loss=settings)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    assert found.parts.routing > 1e-3
    parameters = list(model.parameters())
    one, other = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found.total, expected))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def setting(shards: Path) -> tuple[Backbone, Batch, ShardSet]:
    run = make_run(shards, Path("runs"))
    data = sharpmoe.open_shards(shards)
    return stirred_model(run).train(), next(sharpmoe.batches(data, 4)), data


@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: ", ".join(map(str, fields.values())))
def test_every_schedule_has_the_value_and_the_gradient_of_plain(
    fields: dict[str, Any], setting: tuple[Backbone, Batch, ShardSet]
) -> None:
    model, batch, data = setting
    gradients, values = [], []
    for chosen in ({}, fields):
        model.zero_grad()
        rollout = RolloutConfig(num_steps=3, **chosen)
        loss = sharpmoe.rollout_loss(model, batch, rollout=rollout, empty_text=data.empty_text()).total
        (0.5 * loss).backward()
        values.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_without_gradients_nothing_is_kept(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, data = setting
    settings = {"rollout": RolloutConfig(num_steps=3), "empty_text": data.empty_text()}
    with torch.no_grad():
        found = sharpmoe.rollout_loss(model, batch, **settings)
        again = sharpmoe.rollout_loss(
            model, batch, rollout=RolloutConfig(num_steps=3, schedule="two_pass"), empty_text=data.empty_text()
        )
    assert not found.total.requires_grad
    assert found.total == again.total == sharpmoe.rollout_loss(model, batch, **settings).total


def test_tensors_of_ones_own_are_a_batch(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, data = setting
    fields = ("latent", "saliency", "text", "text_mask", "pooled")
    own = {name: getattr(batch, name) for name in fields}
    settings = {"rollout": RolloutConfig(num_steps=2), "empty_text": data.empty_text()}
    keyed = sharpmoe.rollout_loss(model, own | {"position": batch.position}, **settings)
    assert keyed.total == sharpmoe.rollout_loss(model, batch, **settings).total
    shorter = {**own, "text": own["text"][:, :1], "text_mask": own["text_mask"][:, :1]}
    assert sharpmoe.rollout_loss(model, shorter, **settings).total.isfinite()  # the empty caption is the longer one
    torch.manual_seed(3)
    drawn = [sharpmoe.rollout_loss(model, own, **settings).total.item() for _ in range(2)]
    torch.manual_seed(3)
    assert sharpmoe.rollout_loss(model, own, **settings).total.item() == drawn[0] != drawn[1]


def test_the_model_encodes_the_empty_caption_itself(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, data = setting
    rollout = RolloutConfig(num_steps=2, caption_dropout=0.9)
    given = sharpmoe.rollout_loss(model, batch, rollout=rollout, empty_text=data.empty_text()).total
    with pytest.raises(ConfigError, match=r"needs the empty caption; give empty_text=shards\.empty_text\(\)"):
        sharpmoe.rollout_loss(model, batch, rollout=rollout)
    assert sharpmoe.rollout_loss(model, batch, rollout=RolloutConfig(num_steps=2, caption_dropout=0)).total.isfinite()
    model.origin = origin_header(data)
    try:
        torch.testing.assert_close(sharpmoe.rollout_loss(model, batch, rollout=rollout).total, given, rtol=1e-3, atol=0)
    finally:
        del model.origin


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "batch: lacks latent, saliency, text, text_mask, pooled; a text-conditional model takes"),
    "other name": ({"caption": torch.zeros(4)}, "batch: has caption; a text-conditional model takes latent"),
    "channels": ({"latent": torch.zeros(4, 3, 8, 8)}, r"latent has shape \(4, 3, 8, 8\), expected \(B, 4, H, W\)"),
    "side": ({"latent": torch.zeros(4, 4, 7, 8)}, "with H and W multiples of 2"),
    "tokens": ({"saliency": torch.zeros(4, 64)}, r"saliency has shape \(4, 64\), expected \(4, 16\)"),
    "text": ({"text": torch.zeros(4, 16, 8)}, r"text has shape \(4, 16, 8\), expected \(4, 16, 32\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_batch_that_does_not_fit_is_one_line(case: str, setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, _ = setting
    changes, message = WRONG[case]
    fields = ("latent", "saliency", "text", "text_mask", "pooled")
    own = {} if case == "none" else {name: getattr(batch, name) for name in fields} | changes
    with pytest.raises(DataError, match=message) as found:
        sharpmoe.rollout_loss(model, own)
    assert "\n" not in str(found.value)


def test_the_weight_of_the_routing_loss_rises_with_the_step(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, data = setting
    loss = LossConfig(routing_weight=0.8, routing_warmup_steps=4)
    settings = {"rollout": RolloutConfig(num_steps=2), "loss": loss, "empty_text": data.empty_text()}
    found = [sharpmoe.rollout_loss(model, batch, step=step, **settings) for step in (0, 1, 4, 9)]
    without = found[0].total.item()
    routing = found[0].parts.routing.item()
    assert [each.total.item() - without for each in found] == pytest.approx(
        [0, 0.2 * routing, 0.8 * routing, 0.8 * routing], rel=1e-4, abs=1e-6
    )
    with pytest.raises(ConfigError, match="needs the number of the step"):
        sharpmoe.rollout_loss(model, batch, **settings)
    for name in ("saliency_entropy", "mass_spread"):
        with pytest.raises(ConfigError, match="a run finds the scales"):
            sharpmoe.rollout_loss(model, batch, **{**settings, "loss": LossConfig(**{name: 0.9})})


def test_a_model_without_saliency_routers_cannot_train_them_alone() -> None:
    model = toy_model(saliency_router=False).train()
    loss = LossConfig(routing_gradient="saliency_routers")
    with pytest.raises(ConfigError, match=r"the model has none: .* call sharpmoe.attach\(model\) first"):
        sharpmoe.rollout_loss(model, {}, loss=loss)


def test_segments_are_those_of_a_run(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, data = setting
    rollout = RolloutConfig(num_steps=3, schedule="segments")
    blocks = {draws.rollout_block(7, step, 3): step for step in range(20)}
    seen = []
    for step in (*blocks.values(), blocks[0]):
        model.zero_grad()
        sharpmoe.rollout_loss(
            model, batch, rollout=rollout, empty_text=data.empty_text(), seed=7, step=step
        ).total.backward()
        seen.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[list(blocks).index(0)], seen[-1])


def test_a_model_in_eval_mode_is_refused(setting: tuple[Backbone, Batch, ShardSet]) -> None:
    model, batch, _ = setting
    model.eval()
    try:
        with pytest.raises(ConfigError, match=r"call model.train\(\) first"):
            sharpmoe.rollout_loss(model, batch)
    finally:
        model.train()


def test_batches_go_on_where_they_stopped(shards: Path) -> None:
    data = sharpmoe.open_shards(shards)
    whole = [batch.keys for _, batch in zip(range(6), sharpmoe.batches(data, 4, seed=5), strict=False)]
    rest = [batch.keys for _, batch in zip(range(3), sharpmoe.batches(data, 4, seed=5, start=12), strict=False)]
    assert rest == whole[3:]
    assert sorted(sum(whole[:5], ())) == sorted({key for keys in whole for key in keys})  # 20 samples are an epoch
    with pytest.raises(ConfigError, match="batch_size is 0"):
        sharpmoe.batches(data, 0)


# --- models and pictures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def test_a_model_is_loaded_from_a_run_a_checkpoint_and_a_file(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "step00000002"
    ema, live = sharpmoe.load(run_folder), sharpmoe.load(run_folder, weights="live")
    assert not ema.training
    difference = live.state_dict()["final_layer.linear.bias"] - ema.state_dict()["final_layer.linear.bias"]
    assert torch.allclose(difference, torch.tensor(0.5))
    for place in (checkpoint, checkpoint / "ema.safetensors", str(run_folder)):
        again = sharpmoe.load(place)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in ema.state_dict().items())
    with pytest.raises(CheckpointError, match="neither a run folder"):
        sharpmoe.load(run_folder.parent)


def test_weights_that_do_not_keep_their_codec_have_that_of_their_run(run_folder: Path) -> None:
    shards = sharpmoe.open_shards(run_folder.parent / "shards")
    assert sharpmoe.load(run_folder).origin == origin_header(shards)


def test_what_is_saved_is_what_was_trained(run_folder: Path, tmp_path: Path) -> None:
    model = sharpmoe.load(run_folder)
    saved = sharpmoe.save(model.train(), tmp_path / "own.safetensors")
    again = sharpmoe.load(saved)
    assert again.config == model.config
    assert again.origin == model.origin
    assert FITTED_KEY in again.origin
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    blank = stirred_model(make_run(run_folder.parent / "shards", tmp_path))
    assert sharpmoe.load(sharpmoe.save(blank, tmp_path / "blank.safetensors")).origin == {}
    named = sharpmoe.save(blank, tmp_path / "named.safetensors", shards=run_folder.parent / "shards")
    assert sharpmoe.load(named).origin == model.origin


def pixels_of(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_samples_are_those_of_the_command(run_folder: Path, tmp_path: Path) -> None:
    model, shards = sharpmoe.load(run_folder).train(), sharpmoe.open_shards(run_folder.parent / "shards")
    base = stirred_model(make_run(run_folder.parent / "shards", tmp_path))
    captions, settings = ["a red circle", "a blue square"], SampleConfig(num_steps=3, cfg_scale=3.0, seed=4)
    draw_to_files(model, shards, Prompts(tuple(captions)), settings, tmp_path, DrawOptions())
    drawn = pixels_of([Image.open(path) for path in sorted(tmp_path.glob("0*.png"))])
    given = {"num_steps": 3, "cfg_scale": 3.0, "seed": 4}
    found = sharpmoe.sample(model, captions, shards=shards, **given)
    assert [image.size for image in found] == [(32, 32)] * 2
    assert np.array_equal(pixels_of(found), drawn)
    assert model.training
    itself = pixels_of(sharpmoe.sample(model, captions, **given))  # the stored empty caption is in half precision
    assert np.abs(itself - drawn).max() <= 2
    assert not np.array_equal(drawn[0], drawn[1])
    assert len(sharpmoe.sample(model, "a red circle", **given)) == 1
    for changed in ({"shift": 3.0}, {"cfg_norm": "tokens"}, {"cfg_interval": (0.0, 0.4)}, {"weak_model": base}):
        assert not np.array_equal(pixels_of(sharpmoe.sample(model, captions, shards=shards, **given, **changed)), drawn)
    with pytest.raises(ConfigError, match=r"sample: cfg_interval \(0.5, 0.2\) must be two times"):
        sharpmoe.sample(model, captions, shards=shards, cfg_interval=(0.5, 0.2))
    for source in (shards, None):
        (wide,) = sharpmoe.sample(model, "a red circle", shards=source, width=48, height=16, **given)
        assert wide.size == (48, 16)
        with pytest.raises(ConfigError, match=r"width 20: not a multiple of 8 .*take 16"):
            sharpmoe.sample(model, "a red circle", shards=source, width=20, **given)


def test_looks_are_drawn_beside_the_same_images(run_folder: Path, tmp_path: Path) -> None:
    model, captions = sharpmoe.load(run_folder), ["a red circle", "a blue square"]
    given: dict[str, Any] = {"num_steps": 2, "cfg_scale": 1.0, "shards": run_folder.parent / "shards"}
    drawn = pixels_of(sharpmoe.sample(model, captions, **given))
    film = sharpmoe.sample(model, captions, film=tmp_path, film_frames=2, **given)
    both = sharpmoe.sample(model, captions, counterfactual=tmp_path, **given)
    assert np.array_equal(pixels_of(film), drawn)
    assert np.array_equal(pixels_of(both), drawn)
    told = json.loads((tmp_path / "film.json").read_text())
    assert (told["captions"], len(told["times"])) == (captions, 2)
    assert set(json.loads((tmp_path / "counterfactual.json").read_text())["changes"]) == {"off", "swapped"}
    for name in ("film", "counterfactual"):
        assert (tmp_path / f"{name}.png").is_file()
    with pytest.raises(ConfigError, match="give one of them"):
        sharpmoe.sample(model, captions, film=tmp_path, counterfactual=tmp_path, **given)


def test_classes_are_drawn_by_label(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, model={"conditioning": "class", "num_classes": 4})
    model = stirred_model(run).eval()
    images = sharpmoe.sample(model, [0, 3], shards=shards, num_steps=2)
    assert len(images) == len(sharpmoe.sample(model, range(2), shards=shards, num_steps=2)) == 2
    assert len(sharpmoe.sample(model, 1, shards=shards, num_steps=2)) == 1
    with pytest.raises(ConfigError, match="label 4, the model has classes 0 to 3"):
        sharpmoe.sample(model, [0, 4], shards=shards)
    with pytest.raises(ConfigError, match="class-conditional: give --labels"):
        sharpmoe.sample(model, ["a red circle"], shards=shards)
    with pytest.raises(ConfigError, match="does not say with which codec it was trained; give shards=FOLDER"):
        sharpmoe.sample(model, [0])


def test_settings_and_prompts_of_another_kind_are_one_line(run_folder: Path) -> None:
    model = sharpmoe.load(run_folder)
    with pytest.raises(SharpMoEError, match="text-conditional, got label 3; give captions"):
        sharpmoe.sample(model, [3])
    with pytest.raises(SharpMoEError, match=r"sample\.num_steps: .*got 0"):
        sharpmoe.sample(model, "a", num_steps=0)


def test_weights_of_an_older_version_away_from_their_run(run_folder: Path, tmp_path: Path) -> None:
    model = sharpmoe.load(run_folder)
    header = {key: value for key, value in model.origin.items() if key != FITTED_KEY}
    save_weights(tmp_path / "old.safetensors", model.state_dict(), model.config, header)
    old = sharpmoe.load(tmp_path / "old.safetensors")
    with pytest.raises(DataError, match="holds only the hash of its codec"):
        sharpmoe.sample(old, "a red circle", num_steps=1)
    assert sharpmoe.sample(old, "a red circle", num_steps=1, shards=run_folder.parent / "shards")
