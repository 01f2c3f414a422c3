import math

import pytest
import torch
from torch import Tensor

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.flow import sampling_times, shift_factor
from sharpmoe.model.backbone import ClassCondition, Condition, ModelOutput, TextCondition
from sharpmoe.model.embed import patchify
from sharpmoe.moe.routing import CallMode
from sharpmoe.sampling import CfgSettings, Request, SamplingOptions, SamplingStep, _euler, _heun, generate, make_field
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, toy_config, toy_model

ROUTERS = ("dense", "tc", "ec", "diffmoe")


class Recorder:
    """A model whose velocity is known, and that remembers what it was asked."""

    factor = 1.0  # of the velocity

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Condition, Tensor | None]] = []
        self.pools: list[int] = []

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        x0_prev: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> ModelOutput:
        self.calls.append((x_t, t, condition, x0_prev))
        self.pools.append(mode.pools)
        labels = condition.labels if isinstance(condition, ClassCondition) else torch.zeros(len(x_t))
        return ModelOutput(x_t * self.factor * (1.0 + labels.view(-1, 1, 1, 1)), ())


def captions(count: int) -> TextCondition:
    g = torch.Generator().manual_seed(5)
    states = torch.randn(count, TEXT_LENGTH, TEXT_WIDTH, generator=g)
    mask = torch.ones(count, TEXT_LENGTH, dtype=torch.bool)
    return TextCondition(states, mask, torch.randn(count, POOLED_WIDTH, generator=g))


def empty_text() -> tuple[Tensor, Tensor, Tensor]:
    # Longer than the captions, as stored embeddings are padded and encoded ones only to the longest of their batch.
    return torch.zeros(5, TEXT_WIDTH), torch.tensor([True, True, False, False, False]), torch.zeros(POOLED_WIDTH)


def request(count: int) -> Request:
    cond = captions(count)
    return Request(cond, sampling.empty_condition(cond, toy_config(), empty_text()), tuple(range(count)))


def test_euler_and_heun_integrate_to_data_with_their_orders() -> None:
    def field(x: Tensor, t: Tensor, x0_prev: tuple[Tensor, ...]) -> sampling._Evaluation:
        return sampling._Evaluation(x * torch.cos(3 * t), x0_prev)

    x = torch.ones(1, 1, 1, 1)
    exact = math.exp(-math.sin(3.0) / 3)
    errors = {
        (sampler, steps): abs(sampler(field, x, sampling_times(steps), ()).item() - exact)
        for sampler in (_euler, _heun)
        for steps in (20, 40)
    }
    assert errors[_euler, 20] / errors[_euler, 40] == pytest.approx(2, rel=0.15)
    assert errors[_heun, 20] / errors[_heun, 40] > 3  # the last step is Euler's
    assert errors[_heun, 40] < errors[_euler, 40] / 10


def test_the_first_step_is_guided_by_the_noise_and_the_next_by_x0_hat() -> None:
    model = Recorder()
    field = make_field(model, (ClassCondition(torch.zeros(2)),), CfgSettings())
    x = torch.randn(2, 1, 2, 2)
    _euler(field, x, sampling_times(2), (x,))
    (first_x, first_t, _, first_guide), (second_x, second_t, _, second_guide) = model.calls
    assert first_t.tolist() == [1, 1]
    assert second_t.tolist() == [0.5, 0.5]
    assert torch.equal(first_guide, x)
    torch.testing.assert_close(second_guide, first_x - 1.0 * first_x)  # x_t - t v with v = x_t
    torch.testing.assert_close(second_x, x - 0.5 * x)


@pytest.mark.parametrize("source", ["own", "guided"])
def test_each_branch_carries_the_x0_hat_of_its_source(source: str) -> None:
    model, x = Recorder(), torch.full((1, 1, 1, 1), 2.0)
    branches = (ClassCondition(torch.tensor([1.0])), ClassCondition(torch.tensor([0.0])))  # v = 2x and v = x
    step = make_field(model, branches, CfgSettings(cfg_scale=3.0, source=source))(x, torch.tensor(0.5), (x, x))
    assert step.velocity.item() == 2 + 3 * (4 - 2)
    expected = [2 - 0.5 * 4, 2 - 0.5 * 2] if source == "own" else [2 - 0.5 * 8] * 2
    assert [guide.item() for guide in step.x0_prev] == expected


def test_only_a_model_with_a_saliency_router_is_guided() -> None:
    model, x = Recorder(), torch.zeros(1, 1, 1, 1)
    field = make_field(model, (ClassCondition(torch.zeros(1)),), CfgSettings(saliency_router=False))
    field(x, torch.tensor(1.0), (x,))
    assert model.calls[0][3] is None


@pytest.mark.parametrize(("pool", "pools"), [("all", 1), ("call", 2), ("image", 6)])
def test_branches_share_a_call_in_which_pools_stay_apart(pool: str, pools: int) -> None:
    model, x = Recorder(), torch.randn(3, 1, 1, 1)
    branches = (ClassCondition(torch.ones(3)), ClassCondition(torch.zeros(3)))
    step = make_field(model, branches, CfgSettings(cfg_scale=2.0, pool=pool))(x, torch.tensor(1.0), (x, x))
    assert [len(call[0]) for call in model.calls] == [6]
    assert model.pools == [pools]
    torch.testing.assert_close(step.velocity, x + 2 * (2 * x - x))


def test_only_a_predicted_count_tells_branches_apart() -> None:
    settings = SampleConfig()
    pools = {router: CfgSettings.of(toy_config(router), settings).pool for router in (*ROUTERS, "race")}
    assert pools == {"dense": "all", "tc": "all", "ec": "all", "diffmoe": "call", "race": "all"}
    by_mask = toy_config("diffmoe", capacity_selection="mask")
    assert CfgSettings.of(by_mask, settings).pool == "all"
    assert CfgSettings.of(toy_config(), settings, pool_per_image=True).pool == "image"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_samples_do_not_depend_on_the_split_of_the_batch(router: str, method: str) -> None:
    model = toy_model(router)
    settings = SampleConfig(num_steps=3, method=method, cfg_scale=2.0)
    per_image = router == "diffmoe"  # its count rule pools the tokens of a call
    whole, split = (
        generate(model, model.config, settings, request(5), SamplingOptions(batch_size=size, pool_per_image=per_image))
        for size in (5, 2)
    )
    assert whole.shape == (5, 4, 8, 8)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-5)


def test_the_pool_of_diffmoe_is_one_call() -> None:
    model = toy_model("diffmoe")
    settings = SampleConfig(num_steps=2, cfg_scale=1.0)
    whole, split = (
        generate(model, model.config, settings, request(5), SamplingOptions(batch_size=size)) for size in (5, 2)
    )
    assert not torch.allclose(whole, split, atol=1e-5)


def test_noise_is_keyed_by_seed_and_index() -> None:
    def noise(seed: int, *indices: int) -> Tensor:
        model, cond = Recorder(), ClassCondition(torch.zeros(len(indices)))
        generate(model, toy_config(), SampleConfig(num_steps=1, seed=seed), Request(cond, None, indices))
        return model.calls[0][0]

    a = noise(1, 4, 7)
    assert torch.equal(a[1:], noise(1, 7))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, noise(2, 4, 7))


def test_guidance_scale_one_needs_no_empty_branch() -> None:
    model = toy_model("ec")
    settings = SampleConfig(num_steps=2, cfg_scale=1.0)
    with_empty = generate(model, model.config, settings, request(2))
    without = generate(model, model.config, settings, request(2)._replace(empty=None))
    assert torch.equal(with_empty, without)


def test_class_conditional_samples_use_the_null_class() -> None:
    model = toy_model("tc", conditioning="class", num_classes=3)
    cond = ClassCondition(torch.tensor([0, 2]))
    empty = sampling.empty_condition(cond, model.config, None)
    assert empty == ClassCondition(empty[0])
    assert empty[0].tolist() == [3, 3]
    latents = generate(model, model.config, SampleConfig(num_steps=2), Request(cond, empty, (0, 1)))
    assert latents.isfinite().all()


def test_sampling_an_untrained_saliency_router_equals_the_base() -> None:
    model = toy_model("ec")
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.saliency_router.out.weight.zero_()
            layer.saliency_router.out.bias.zero_()
    settings = SampleConfig(num_steps=3)
    base = model.config.model_copy(update={"saliency_router": False})
    assert torch.equal(generate(model, model.config, settings, request(2)), generate(model, base, settings, request(2)))


def test_samples_of_another_aspect() -> None:
    model = toy_model("tc").eval()
    drawn = generate(model, model.config, SampleConfig(num_steps=2), request(2), SamplingOptions(size=(4, 16)))
    assert drawn.shape == (2, model.config.latent_channels, 4, 16)
    square = generate(model, model.config, SampleConfig(num_steps=2), request(2), SamplingOptions(size=(8, 8)))
    assert torch.equal(square, generate(model, model.config, SampleConfig(num_steps=2), request(2)))


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_generated_latents_keep_no_graph(cfg_scale: float) -> None:
    """Nothing else would notice: the latents would be the same, and every step's activations would stay alive."""
    model = toy_model("ec")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()
    modes = []
    hook = model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    latents = generate(model, model.config, SampleConfig(num_steps=2, cfg_scale=cfg_scale), request(2))
    hook.remove()
    assert modes == [False, False]
    assert not latents.requires_grad
    assert latents.grad_fn is None


def test_guidance_without_a_row_for_no_class_is_refused() -> None:
    model = toy_model("ec", conditioning="class", num_classes=3, class_dropout=False)
    one = Request(ClassCondition(torch.tensor([1])), None, (0,))
    with pytest.raises(ConfigError, match=r"cfg_scale is 1.5, but the label table .* set it to 1 \(--cfg-scale 1\)"):
        generate(model, model.config, SampleConfig(num_steps=1), one)
    plain = generate(model, model.config, SampleConfig(num_steps=1, cfg_scale=1.0), one)
    assert plain.isfinite().all()


def test_the_norm_of_tokens_is_that_of_the_published_pipeline() -> None:
    """Nucleus-Image: comb * |cond| / |comb| over the features of each token of (B, N, C p p)."""
    cond, empty = torch.randn(2, 2, 3, 4, 6)
    settings = CfgSettings(cfg_scale=4.0, norm_patch=2)
    found = patchify(sampling._guided(cond, empty, torch.tensor(0.5), settings), 2)
    cond, empty = patchify(cond, 2), patchify(empty, 2)
    comb = empty + 4.0 * (cond - empty)
    torch.testing.assert_close(found, comb * (cond.norm(dim=-1, keepdim=True) / comb.norm(dim=-1, keepdim=True)))


def test_a_token_without_velocity_has_a_finite_norm() -> None:
    zero, cond = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert torch.equal(sampling._with_norm_of(zero, cond, 2), zero)
    assert sampling._with_norm_of(cond, zero, 2).isfinite().all()


def test_guidance_acts_inside_its_interval_only() -> None:
    cond, empty = torch.randn(2, 1, 1, 2, 2)
    settings = CfgSettings(cfg_scale=3.0, interval=(0.25, 0.75))
    for t, acts in ((1.0, False), (0.75, True), (0.5, True), (0.25, True), (0.1, False)):
        found = sampling._guided(cond, empty, torch.tensor(t), settings)
        torch.testing.assert_close(found, empty + 3 * (cond - empty) if acts else cond)


def test_an_interval_of_no_time_is_no_guidance() -> None:
    model = toy_model("ec")
    off = SampleConfig(num_steps=3, cfg_scale=4.0, cfg_interval=(0.0, 0.0))
    plain = SampleConfig(num_steps=3, cfg_scale=1.0)
    drawn, expected = (generate(model, model.config, each, request(2)) for each in (off, plain))
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


def test_times_are_shifted_by_the_tokens_of_the_size() -> None:
    shift = {"factor": "tokens", "base_tokens": 4, "max_tokens": 16}
    sample = SampleConfig(num_steps=4, cfg_scale=1.0, shift=shift)
    for size in ((8, 8), (4, 8)):
        model, cond = Recorder(), ClassCondition(torch.zeros(1))
        generate(model, toy_config(), sample, Request(cond, None, (0,)), SamplingOptions(size=size))
        factor = shift_factor(sample.shift, size[0] * size[1] // 4)
        assert [call[1].item() for call in model.calls] == sampling_times(4, factor)[:-1].tolist()
        assert factor == pytest.approx(math.exp({64: 1.15, 32: 0.5 + 0.65 * 4 / 12}[size[0] * size[1]]))


@pytest.mark.parametrize("source", ["own", "guided"])
@pytest.mark.parametrize("steered", [True, False])
def test_a_weak_model_is_the_other_branch(source: str, steered: bool) -> None:
    """Same latents and conditions, an x0_hat of its own, and none where it has no saliency routers."""
    strong, weak, x = Recorder(), Recorder(), torch.full((2, 1, 1, 1), 2.0)
    weak.factor = 0.5
    branches = (ClassCondition(torch.ones(2)),)  # v = 2x of the strong model, x of the weak one
    settings = CfgSettings(cfg_scale=3.0, source=source)
    field = make_field(strong, branches, settings, sampling.WeakModel(weak, steered))
    step = field(x, torch.tensor(0.5), (x, x + 1))
    assert step.velocity.flatten().tolist() == [2 + 3 * (4 - 2)] * 2
    expected = [2 - 0.5 * 4, 2 - 0.5 * 2] if source == "own" else [2 - 0.5 * 8] * 2
    assert [guide[0].item() for guide in step.x0_prev] == expected
    ((strong_x, _, strong_cond, strong_prev),), ((weak_x, _, weak_cond, weak_prev),) = strong.calls, weak.calls
    assert torch.equal(strong_x, weak_x)
    assert torch.equal(strong_cond.labels, weak_cond.labels)
    assert torch.equal(strong_prev, x)
    assert weak_prev is None if not steered else torch.equal(weak_prev, x + 1)


def test_the_same_model_as_weak_one_is_no_guidance() -> None:
    model = toy_model("ec")
    plain = generate(model, model.config, SampleConfig(num_steps=3, cfg_scale=1.0), request(2))
    weak = generate(
        model, model.config, SampleConfig(num_steps=3, cfg_scale=5.0), request(2), SamplingOptions(weak=model)
    )
    torch.testing.assert_close(weak, plain, rtol=1e-4, atol=1e-5)
    other = toy_model("tc")
    guided = generate(
        model, model.config, SampleConfig(num_steps=3, cfg_scale=5.0), request(2), SamplingOptions(weak=other)
    )
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_a_weak_model_of_other_latents_is_refused_and_one_guides_without_a_null_class() -> None:
    model = toy_model("ec", conditioning="class", num_classes=3, class_dropout=False)
    one, settings = Request(ClassCondition(torch.tensor([1])), None, (0,)), SampleConfig(num_steps=1)
    with pytest.raises(ConfigError, match="weak model: num_classes is 4, expected 3"):
        generate(
            model,
            model.config,
            settings,
            one,
            SamplingOptions(weak=toy_model("ec", conditioning="class", num_classes=4)),
        )
    weak = toy_model("tc", conditioning="class", num_classes=3)
    assert generate(model, model.config, settings, one, SamplingOptions(weak=weak)).isfinite().all()


@pytest.mark.parametrize(("method", "cfg_scale"), [("euler", 2.0), ("heun", 2.0), ("euler", 1.0)])
def test_a_callback_is_told_every_step_and_changes_nothing(method: str, cfg_scale: float) -> None:
    model, told = toy_model("diffmoe").eval(), list[SamplingStep]()
    settings = SampleConfig(num_steps=3, method=method, cfg_scale=cfg_scale)
    drawn = generate(model, model.config, settings, request(3), SamplingOptions(batch_size=2, callback=told.append))
    assert torch.equal(drawn, generate(model, model.config, settings, request(3), SamplingOptions(batch_size=2)))
    assert [(record.step, record.steps, record.images) for record in told] == [
        (step, 3, images) for images in ((0, 1), (2,)) for step in range(3)
    ]
    assert [record.t for record in told] == sampling_times(3)[:3].tolist() * 2
    for first, rows in ((told[0], [0, 1]), (told[3], [2])):
        assert torch.equal(first.x_t, first.x0_prev)  # the noise
        assert len(first.x_t) == len(rows)
    last = told[2]
    torch.testing.assert_close(drawn[:2], last.x0_hat)  # the last step goes to t = 0


@torch.no_grad()
@pytest.mark.parametrize("router", ["tc", "race", "diffmoe"])
def test_the_routing_of_a_callback_is_that_of_the_conditional_branch(router: str) -> None:
    model, told = toy_model(router).eval(), list[SamplingStep]()
    wanted = request(2)
    generate(
        model, model.config, SampleConfig(num_steps=2, cfg_scale=3.0), wanted, SamplingOptions(callback=told.append)
    )
    for record in told:
        times = torch.full((2,), record.t)
        alone = model(record.x_t, times, wanted.cond, record.x0_prev).routing
        assert len(record.routing) == len(alone) == len(model.moe_layers())
        for given, expected in zip(record.routing, alone, strict=True):
            for name, value in expected._asdict().items():
                assert (value is None) == (getattr(given, name) is None), name
                if value is not None and name != "cutoff":
                    torch.testing.assert_close(getattr(given, name), value, msg=name)


def test_the_x0_hat_of_a_callback_is_guided_and_its_x0_prev_is_what_the_router_reads() -> None:
    model, told = toy_model("tc").eval(), list[SamplingStep]()
    generate(
        model, model.config, SampleConfig(num_steps=3, cfg_scale=3.0), request(2), SamplingOptions(callback=told.append)
    )
    first, second, _ = told
    velocity = (first.x_t - first.x0_hat) / first.t
    torch.testing.assert_close(second.x_t, first.x_t + (second.t - first.t) * velocity)
    assert not torch.allclose(second.x0_prev, first.x0_hat)  # that of its own branch
    told.clear()
    settings = SampleConfig(num_steps=2, cfg_scale=3.0, guidance_source="guided")
    generate(model, model.config, settings, request(2), SamplingOptions(callback=told.append))
    assert torch.equal(told[1].x0_prev, told[0].x0_hat)


def test_a_model_without_a_saliency_router_has_no_x0_prev_to_tell() -> None:
    model, told = toy_model("dense").eval(), list[SamplingStep]()
    generate(
        model, model.config, SampleConfig(num_steps=1, cfg_scale=1.0), request(1), SamplingOptions(callback=told.append)
    )
    assert (told[0].x0_prev is None) == (not model.config.saliency_router)
    assert told[0].routing == ()


def test_a_callback_that_raises_ends_the_sampling_with_its_own_error() -> None:
    model, seen = toy_model("tc").eval(), list[int]()

    def refuse(record: SamplingStep) -> None:
        seen.append(record.step)
        if record.step == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="^enough$"):
        generate(model, model.config, SampleConfig(num_steps=4), request(1), SamplingOptions(callback=refuse))
    assert seen == [0, 1]


@pytest.mark.parametrize("saliency", ["off", "swapped"])
def test_what_the_saliency_routers_read_is_an_argument(saliency: str) -> None:
    """Off, the gates decide alone; swapped, they read the x0_hat of another image. The model stays as it is."""
    model, config = toy_model("ec"), toy_config("ec")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read: dict[str, list[SamplingStep]] = {"own": [], saliency: []}
    asked = Request(captions(3), None, (0, 1, 2))
    settings = SampleConfig(num_steps=2, cfg_scale=1)
    drawn = {
        how: generate(model, config, settings, asked, SamplingOptions(callback=read[how].append, saliency=how))  # type: ignore[arg-type]
        for how in read
    }
    assert not torch.equal(drawn["own"], drawn[saliency])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own, other = read["own"][0], read[saliency][0]
    assert own.x0_prev is not None
    if saliency == "off":
        assert other.x0_prev is None
        assert all(torch.equal(layer.logits, layer.gate_logits) for step in read["off"] for layer in step.routing)
    else:
        assert other.x0_prev is not None
        assert torch.equal(other.x0_prev, own.x0_prev[[2, 0, 1]])
        expected = model(own.x_t, torch.ones(3), asked.cond, own.x0_prev[[2, 0, 1]]).routing
        for a, b in zip(other.routing, expected, strict=True):
            torch.testing.assert_close(a.logits, b.logits)


@pytest.mark.parametrize("norm", ["none", "tokens"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_model_with_frames_draws_clips(method: str, norm: str) -> None:
    """One frame is the still image, bit for bit; of several each gets noise of its own and hears of the others."""
    settings = SampleConfig(num_steps=2, method=method, cfg_scale=3.0, cfg_norm=norm)
    still, model = toy_model("ec"), toy_model("ec", latent_frames=3)
    clips = generate(model, model.config, settings, request(2))
    assert clips.shape == (2, 4, 3, 8, 8)
    assert not torch.equal(clips[:, :, 0], clips[:, :, 1])
    noise = torch.randn(2, 4, 1, 8, 8)
    drawn = generate(still, still.config, settings, request(2), SamplingOptions(noise=noise[:, :, 0]))
    assert torch.equal(
        generate(still, still.config, settings, request(2), SamplingOptions(noise=noise))[:, :, 0], drawn
    )
