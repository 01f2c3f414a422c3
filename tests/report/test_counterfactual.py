"""The same noise with saliency routers on, off and guided by another image."""

import json
from pathlib import Path

import pytest
import torch

from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.report.counterfactual import counterfactual_table, draw_counterfactual, write_counterfactual
from sharpmoe.sampling import SamplingOptions, generate
from tests.report.test_film import decode, request
from tests.toys import toy_model

SETTINGS = SampleConfig(num_steps=3, cfg_scale=1)


def test_variants_are_what_sampling_draws(tmp_path: Path) -> None:
    model = toy_model("ec")
    found = draw_counterfactual(model, request(), SETTINGS, decode)
    for name, saliency in (("on", "own"), ("off", "off"), ("swapped", "swapped")):
        latents = generate(model, model.config, SETTINGS, request(), SamplingOptions(saliency=saliency))  # type: ignore[arg-type]
        assert torch.equal(found.images[name], decode(latents))
    change = found.changes["off"]
    rms = (found.images["on"] - found.images["off"]).square().flatten(1).mean(1).sqrt().mean()
    assert change.pixels == pytest.approx(float(rms))
    assert 0 < change.choices["all t"] <= 1
    assert change.experts == change.experts_on == 1  # expert choice: the same number of rows, elsewhere
    assert [line.split()[0] for line in counterfactual_table(found).splitlines()[2:]] == ["on", "off", "swapped"]
    assert write_counterfactual(tmp_path, found, ["a", "b", "c"], "toy", 0).is_file()
    assert json.loads((tmp_path / "counterfactual.json").read_text())["changes"]["off"]["pixels_rms"] == change.pixels


def test_a_router_that_decides_nothing_changes_nothing() -> None:
    model = toy_model("ec")
    with torch.no_grad():
        for layer in model.moe_layers():
            for name, parameter in layer.named_parameters():
                if "saliency_router.out" in name:
                    parameter.zero_()
    found = draw_counterfactual(model, request(), SETTINGS, decode)
    for change in found.changes.values():
        assert (change.pixels, change.choices["all t"]) == (0, 0)


def test_what_has_no_counterfactual_is_refused() -> None:
    with pytest.raises(ConfigError, match="between 2 to --batch-size"):
        draw_counterfactual(toy_model("ec"), request(1), SETTINGS, decode)
    with pytest.raises(ConfigError, match="between 2 to --batch-size"):
        draw_counterfactual(toy_model("ec"), request(3), SETTINGS, decode, SamplingOptions(batch_size=2))
    with pytest.raises(ConfigError, match="the model has none"):
        draw_counterfactual(toy_model("ec", saliency_router=False), request(), SETTINGS, decode)
