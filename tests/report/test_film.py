"""The film strip: which steps it keeps, and what it shows of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import TextCondition
from sharpmoe.report.film import draw_film, record_film, write_film
from sharpmoe.sampling import Request, SamplingOptions, SamplingStep, generate
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, toy_model


def request(count: int = 3) -> Request:
    text = torch.randn(count, TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    cond = TextCondition(text, torch.ones(count, TEXT_LENGTH, dtype=torch.bool), torch.zeros(count, POOLED_WIDTH))
    return Request(cond, None, tuple(range(count)))


def decode(latents: Tensor) -> Tensor:
    return latents[:, :3].clamp(-1, 1)


SETTINGS = SampleConfig(num_steps=5, cfg_scale=1)


def test_a_film_shows_what_a_callback_is_told(tmp_path: Path) -> None:
    model, steps = toy_model("ec"), list[SamplingStep]()
    drawn = generate(model, model.config, SETTINGS, request(), SamplingOptions(callback=steps.append))
    film = record_film(model, request(), SETTINGS, decode, 3, SamplingOptions(batch_size=2))  # in two batches
    assert torch.allclose(film.images, decode(drawn))
    assert film.times == pytest.approx([steps[k].t for k in (0, 2, 4)])
    for row, k in enumerate((0, 2, 4)):
        assert steps[k].x0_prev is not None
        torch.testing.assert_close(film.seen[row], decode(steps[k].x0_prev))
        assert torch.equal(film.experts[row], sum(layer.routing_map.sum(-1) for layer in steps[k].routing))
    path = write_film(tmp_path / "looks", film, ["a", "b", "c"], "toy", seed=0)
    assert path.is_file()
    content = json.loads((tmp_path / "looks" / "film.json").read_text())
    assert torch.equal(torch.tensor(content["experts_per_token"]), film.experts)


def test_more_frames_than_steps_are_all_steps() -> None:
    film = record_film(toy_model("ec", saliency_router=False), request(1), SETTINGS, decode, 20)
    assert (len(film.times), film.reads) == (5, False)
    assert draw_film(film, ["$a$ \x07"]).ndim == 3


def test_a_dense_model_has_no_film() -> None:
    with pytest.raises(ConfigError, match="no MoE layer"):
        record_film(toy_model("dense", saliency_router=False), request(1), SETTINGS, decode, 3)
