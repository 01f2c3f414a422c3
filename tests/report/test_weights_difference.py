"""What differs between two weights: hand-made changes are found with their size, swapped experts with their places."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.report import weights_difference
from sharpmoe.report.weights_difference import Change, compare_weights, part_of
from tests.toys import toy_config, toy_model


class Weights(SimpleNamespace):
    """Tensors in memory, read by name."""

    def __init__(self, tensors: dict[str, Tensor], path: str = "w") -> None:
        super().__init__(tensors=tensors, path=path, names=frozenset(tensors))

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def weights(**fields: object) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in toy_model(**fields).state_dict().items()}


def test_equal_weights_have_no_difference() -> None:
    found = compare_weights(Weights(weights()), Weights(weights()))
    assert found.equal == found.whole.tensors == len(weights())
    assert found.whole.relative == 0
    assert [found.new, found.missing, found.reshaped] == [(), (), {}]
    assert [(layer.moves, layer.reordered) for layer in found.layers] == [((), {})] * 2


def test_a_scaled_part_has_its_relative_change() -> None:
    changed = weights()
    changed["blocks.1.moe.gate.weight"] *= 1.25
    changed["blocks.3.moe.experts.w1"][2] *= -1
    found = compare_weights(Weights(weights()), Weights(changed))
    first, second = found.layers
    assert (first.block, second.block) == (1, 3)
    assert first.parts["gate"].relative == pytest.approx(0.25)
    assert first.parts["gate"].cosine == pytest.approx(1)
    assert second.parts["gate"].relative == 0
    assert [each.change.moved > 0 for each in second.experts] == [False, False, True, False]
    assert found.parts["blocks.moe.gate"].relative < 0.25  # the gates of both layers together
    assert found.equal == len(weights()) - 2


@pytest.mark.parametrize("router", ["diffmoe", "promoe_ec", "race", "dsmoe"])
def test_swapped_experts_are_noticed_with_their_routers(router: str) -> None:
    fields = {"conditioning": "class", "num_classes": 4} if router == "promoe_ec" else {}
    before, after = weights(router=router, **fields), weights(router=router, **fields)
    size, order = toy_config().num_experts, [2, 1, 3, 0]  # expert e of B is expert order[e] of A
    layer = "blocks.1.moe."
    for name in [name for name in after if name.startswith(layer) and ".hidden." not in name]:
        if len(after[name]) in (size, size + 1):  # an unconditional expert stays the last
            after[name][:size] = after[name][order]
    found = compare_weights(Weights(before), Weights(after))
    swapped, other = found.layers
    assert swapped.moves == ((0, 3), (2, 0), (3, 2))
    assert other.moves == ()
    assert swapped.is_related
    assert all(each.matched_change.cosine == pytest.approx(1) for each in swapped.experts)
    assert all(part.relative == 0 for part in swapped.reordered.values())
    assert swapped.parts["gate"].relative > 0.1
    assert swapped.parts["saliency_router"].relative > 0.1


def test_unrelated_experts_are_not_called_swapped() -> None:
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) for name, value in weights().items()}
    assert not any(layer.is_related for layer in compare_weights(Weights(weights()), Weights(other)).layers)


def test_experts_of_another_number_are_matched_and_reported_as_another_shape() -> None:
    before, after = weights(), weights()
    for name in [name for name in after if "blocks.1.moe.experts" in name]:
        after[name] = torch.cat([torch.randn_like(after[name][:1]), after[name]])
    found = compare_weights(Weights(before), Weights(after))
    assert sorted(found.reshaped) == [f"blocks.1.moe.experts.w{k}" for k in (1, 2, 3)]
    assert [each.matched for each in found.layers[0].experts] == [1, 2, 3, 4]


def test_names_of_only_one_are_listed() -> None:
    base = {name: value for name, value in weights().items() if "saliency_router" not in name}
    found = compare_weights(Weights(base), Weights(weights()))
    assert len(found.new) == 8
    assert {part_of(name) for name in found.new} == {"blocks.moe.saliency_router"}
    assert compare_weights(Weights(weights()), Weights(base)).missing == found.new


def test_a_change_from_zero_has_no_relative_size() -> None:
    change = Change.between(torch.zeros(2), torch.tensor([3.0, 4.0]))
    assert (change.relative, change.cosine, change.figures()["norm_after"]) == (None, None, 5)


def test_what_cannot_be_compared_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="no tensor has a name of a.safetensors"):
        compare_weights(Weights({"x": torch.ones(1)}, "a.safetensors"), Weights({"y": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="x holds values that are not finite"):
        compare_weights(Weights({"x": torch.ones(1)}), Weights({"x": torch.tensor([torch.nan])}))


def test_large_tensors_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    other = {name: value + torch.randn_like(value) for name, value in weights().items()}
    whole = compare_weights(Weights(weights()), Weights(other))
    monkeypatch.setattr(weights_difference, "_AT_A_TIME", 64)
    parts = compare_weights(Weights(weights()), Weights(other))
    assert parts.whole.figures() == pytest.approx(whole.whole.figures())
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert [x.change.figures() for x in a.experts] == [pytest.approx(x.change.figures()) for x in b.experts]
