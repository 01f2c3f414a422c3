"""Router families: what the records say is what the rules do, and a new family is one record and one rule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES, Family, rows_of_call, rows_per_expert, tokens_per_expert, total_rows
from sharpmoe.log_file import read_log
from sharpmoe.losses import HEAD_LOSSES, ROUTER_LOSSES
from sharpmoe.model.flops import Call, backward_flops, forward_flops, products
from sharpmoe.model.weights import load_model
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.selection import RULES, Rule, RuleInput
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.estimate import Planner
from sharpmoe.train.flops import rows_expected
from sharpmoe.train.loop import train
from sharpmoe.train.metrics import routing_scalars, routing_sums
from sharpmoe.train.rollout_schedules import schedule_of
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.model.test_flops import IMAGES, counted
from tests.toys import TEXT_LENGTH, toy_model
from tests.train.setting import CONFIGS, make_run, plan_for

ROUTED = [name for name, family in FAMILIES.items() if family.has_experts]
PROMOE = {
    "gate": "prototypes",
    "score": "identity",
    "unconditional_expert": True,
    "shared": "gelu",
    "expert_hidden": 48,
    "shared_hidden": 48,
}


def test_published_defaults() -> None:
    """At width 24, as they were before there were records."""
    assert {name: family.model_fields(24) for name, family in FAMILIES.items()} == {
        "dense": {},
        "tc": {},
        "ec": {},
        "diffmoe": {},
        "promoe_tc": PROMOE,
        "promoe_ec": PROMOE,
        "dsmoe": {
            "score": "sigmoid",
            "top_k": 2,
            "renormalise": True,
            "routed_scale": 2.0,
            "bias_balancing": True,
            "expert": "swiglu",
            "shared": "swiglu",
            "mlp": "silu",
            "positions": "rope_2d",
            "expert_hidden": 48,
            "shared_hidden": 48,
        },
        "dit_moe": {"top_k": 2, "expert": "swiglu", "shared": "swiglu", "shared_hidden": 48, "moe_every": 1},
        "race": {"gate": "mlp", "score": "identity", "layer_heads": True},
        "nucleus": {
            "backbone": "nucleus",
            "gate_input": "time_and_state",
            "renormalise": True,
            "routed_scale": 2.5,
            "expert": "swiglu",
            "shared": "swiglu",
            "mlp": "swiglu",
            "moe_every": 1,
            "dense_first": 3,
            "latent_channels": 16,
            "text_width": 4096,
        },
    }


def test_defaults_give_way_to_what_a_run_says() -> None:
    made = ModelConfig(router="dsmoe", width=32, num_heads=2, top_k=3, expert_hidden=7)
    assert (made.top_k, made.expert_hidden, made.shared_hidden, made.score) == (3, 7, 64, "sigmoid")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_record_names_losses_and_heads_that_exist(name: str) -> None:
    family = FAMILIES[name]
    assert family.router_loss is None or family.router_loss in ROUTER_LOSSES
    assert family.head_loss is None or family.head_loss in HEAD_LOSSES
    assert (family.head_loss == "capacity") == (family.thresholds == "predicted")  # the head that predicts for them
    config = ModelConfig(router=name, conditioning="class", backbone="dit")
    layer = MoELayer(config) if family.has_experts else None
    assert hasattr(layer, "expert_threshold") == (family.thresholds is not None)


@pytest.mark.parametrize(
    ("model", "router_loss", "head_loss"),
    [
        ({"router": "tc"}, "balance", None),
        ({"router": "tc", "bias_balancing": True}, None, None),
        ({"router": "tc", "gate": "prototypes"}, "contrastive", None),
        ({"router": "promoe_tc"}, "contrastive", None),
        ({"router": "promoe_ec", "gate": "linear", "bias_balancing": True}, "balance", None),
        ({"router": "dit_moe", "gate": "mlp", "layer_heads": True}, "balance", "layers"),
        ({"router": "dsmoe", "bias_balancing": False}, None, None),
        ({"router": "ec"}, None, None),
        ({"router": "diffmoe"}, None, "capacity"),
        ({"router": "race"}, "similarity", "layers"),
        ({"router": "race", "layer_heads": False}, "similarity", None),
        ({"router": "dense"}, None, None),
    ],
)
def test_losses_of_a_model(model: dict[str, Any], router_loss: str | None, head_loss: str | None) -> None:
    config = ModelConfig(conditioning="class", **model)
    assert (config.router_loss, config.head_loss) == (router_loss, head_loss)


@pytest.mark.parametrize("router", ROUTED)
@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 3),
    side=st.integers(1, 4),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    capacity=st.floats(0.2, 2.0),
    seed=st.integers(0, 99),
)
def test_declared_rows_are_those_of_the_rule(
    router: str, images: int, side: int, experts: int, top_k: int, capacity: float, seed: int
) -> None:
    config = ModelConfig(
        router=router,
        latent_size=2 * side,
        num_experts=experts,
        top_k=min(top_k, experts),
        capacity=min(capacity, experts),
        unconditional_expert=False,
    )
    g = torch.Generator().manual_seed(seed)
    tokens = side**2
    scores, logits = (torch.randn(images, tokens, experts, generator=g) for _ in range(2))
    thresholds = torch.randn(experts, generator=g)
    for training in (True, False):
        choice = RuleInput(scores) if training else RuleInput(scores, logits, thresholds)
        rule = RULES[router].train if training else RULES[router].infer
        taken = rule(choice, config).sum((0, 1))
        each = rows_per_expert(config, images, tokens, training=training)
        total = total_rows(config, images, tokens, training=training)
        assert each is None or (taken == each).all()
        assert total is None or taken.sum() == total
        assert (each is not None) == (config.family.fixed_rows(training) == "each")
        assert (total is not None) == (config.family.fixed_rows(training) is not None)
        if training:
            assert taken.sum() == rows_of_call(config, images, config.num_tokens)


def test_what_competes_in_inference_fixes_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "by_image", Family(competition="call", inference="image"))
    monkeypatch.setitem(FAMILIES, "by_call", Family(competition="call"))
    by_image, by_call = (ModelConfig(router=name, num_experts=3) for name in ("by_image", "by_call"))
    for config in (by_image, by_call):
        assert rows_per_expert(config, 2, 16, training=True) == 10  # of 32 tokens
    assert rows_per_expert(by_image, 2, 16, training=False) == 2 * 5  # of 16 tokens each
    assert rows_per_expert(by_call, 3, 16, training=False) is None  # the call may be cut into pools
    assert (by_image.counts_calls, by_call.counts_calls) == (False, True)


def test_what_undoes_fixed_rows() -> None:
    def fixed(router: str, pool_is_call: bool = True, **fields: Any) -> tuple[int | None, int | None]:
        config = ModelConfig(router=router, num_experts=4, conditioning="class", **fields)
        how = {"training": True, "pool_is_call": pool_is_call}
        return rows_per_expert(config, 2, 16, **how), total_rows(config, 2, 16, **how)

    assert fixed("diffmoe") == fixed("ec") == (8, 32)
    assert fixed("race") == fixed("tc") == (None, 32)
    for router in ("diffmoe", "race"):
        assert fixed(router, pool_is_call=False) == (None, None)
    assert fixed("ec", pool_is_call=False) == (8, 32)
    assert fixed("promoe_ec") == (None, None)
    assert fixed("promoe_tc") == (None, 32)  # the unconditional expert takes one row per token, as the choice does
    assert fixed("promoe_tc", top_k=2) == (None, None)
    race = ModelConfig(router="race", capacity=1.1)
    assert total_rows(race, 2, 16, training=True) == 35
    assert total_rows(race, 2, 16, training=True, is_replay=True) is None  # two merged calls of 17


def test_an_unknown_family_is_named_with_the_choices(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage: pretrain\nmodel: {router: difmoe}\n")
    with pytest.raises(ConfigError) as raised:
        load_run_config(file)
    assert "\n" not in str(raised.value)
    assert "model.router: got 'difmoe', allowed: dense | tc | ec | diffmoe | " in str(raised.value)
    assert "; did you mean diffmoe?" in str(raised.value)
    with pytest.raises(ConfigError, match=r"model\.router: got '3', allowed: dense \| tc"):
        load_run_config(file, ["--model.router=3"])


# ---- A family that the project does not have: one record and one rule. ----


def alternate(given: RuleInput, config: ModelConfig) -> Tensor:
    """Expert e takes its best tokens of the whole call, of which every other one is out of reach for it."""
    scores = given.scores.flatten(0, 1)
    place = torch.arange(len(scores), device=scores.device)[:, None] + torch.arange(scores.shape[1])
    reachable = scores.masked_fill(place % 2 == 1, -torch.inf)
    chosen = reachable.topk(tokens_per_expert(len(scores), scores.shape[1], config.capacity), dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, chosen, True).view(given.scores.shape)


def above(given: RuleInput, config: ModelConfig) -> Tensor:
    assert given.thresholds is not None
    return given.scores > given.thresholds


TOY = Family(
    competition="call",
    router_loss="balance",
    thresholds="accepted",
    published={"score": "sigmoid", "shared": "gelu"},
    published_widths={"shared_hidden": 1},
)


def train_toy(world: World, run: RunConfig) -> str:
    """In a process of its own, which no fixture reaches."""
    FAMILIES["toy"], RULES["toy"] = TOY, Rule(alternate, above)
    return str(train(plan_for(run, world), world))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    monkeypatch.setitem(RULES, "toy", Rule(alternate, above))
    return "toy"


@pytest.mark.dist
def test_a_new_family_trains(toy: str, tmp_path: Path) -> None:
    """Three optimizer steps on two ranks; losses, thresholds, records and the log follow from the record."""
    run = make_run(
        make_shards(tmp_path / "shards"), tmp_path, toy, train={"steps": 3},
        loss={"routing_weight": 0.5},
    )  # fmt: skip
    assert (run.model.score, run.model.shared_hidden) == ("sigmoid", 24)
    folder = Path(run_ranks(train_toy, 2, run)[0])
    trained, _ = load_model(folder / "live.safetensors")
    for layer in trained.moe_layers():
        assert (layer.expert_threshold > 0).all()
    logged = read_log(tmp_path / "run" / "log.jsonl")
    assert [logged["loss/router"][step] > 0 for step in (1, 2, 3)] == [True] * 3
    assert [logged["loss/heads"][step] for step in (1, 2, 3)] == [0, 0, 0]
    assert [logged["loss/routing"][step] > 0 for step in (1, 2, 3)] == [True] * 3


def test_a_new_family_is_counted(toy: str) -> None:
    """In metrics, FLOPs and row counts; its rule is the one by which flipped choices are found."""
    model = toy_model(toy, capacity=1.5).train()
    output, forward, backward = counted(model, uses_x0_prev=True)
    about = torch.full((1, IMAGES), 0.5), torch.rand(IMAGES, model.config.num_tokens)
    rows = rows_of_call(model.config, IMAGES, model.config.num_tokens)
    assert [int(record.routing_map.sum()) for record in output.routing] == [rows, rows]
    done = products(
        model.config, Call(images=IMAGES, tokens=16, rows=2 * rows, text_tokens=TEXT_LENGTH, uses_x0_prev=True)
    )
    assert forward_flops(done).total == forward
    assert backward_flops(done).total == backward
    named = routing_scalars(routing_sums([output.routing], model.config, *about))
    assert 0 < named["routing_flipped/layer0"] < 1
    assert named["routing_load_min/layer0"] == named["routing_load_max/layer0"] == 1
    unsteered = tuple(record._replace(routing_map=alternate(RuleInput(record.gate_logits.sigmoid()), model.config))
                      for record in output.routing)  # fmt: skip
    assert routing_scalars(routing_sums([unsteered], model.config, *about))["routing_flipped/layer0"] == 0


@pytest.mark.slow
def test_a_new_family_is_planned(toy: str) -> None:
    run = make_run(Path("shards"), Path("runs"), toy, loss={"routing_weight": 0.5}, model={"capacity": 2.0})
    fewer = make_run(Path("shards"), Path("runs"), toy, loss={"routing_weight": 0.5})
    assert rows_expected(run, 4, 16) == 2 * rows_expected(fewer, 4, 16) == 2 * 2 * 16

    def peak(run: RunConfig) -> int:
        planner = Planner(run)
        layout = planner.layout(2, resolve_ds_config(CONFIGS / "zero3.json", run, 2))
        return planner.estimate(layout, schedule_of(run)).memory.peak

    assert peak(run) > peak(fewer) > 0
