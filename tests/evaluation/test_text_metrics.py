"""Agreement of images and captions: arithmetic, a tiny random CLIP, and reactions of the packaged extractor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.read.shards import ShardSet
from launcher.evaluate import main
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.extractors import EXTRACTORS, Extractor, ExtractorOptions, Features
from sharpmoe.evaluation.metrics import MetricSettings
from sharpmoe.evaluation.sample_metrics import figures_table, judge_sets
from sharpmoe.evaluation.text_metrics import caption_ranks, clip_score, fit_caption_map
from tests.fixtures_data import make_shards

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
CAPTIONS = [f"a {colour} square" for colour in COLOURS]


def test_clip_score_is_scaled_and_never_negative() -> None:
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([2.5, 1.5, 0.0])


def test_a_rank_counts_the_captions_that_are_nearer() -> None:
    texts = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [0.0, 0.0]])
    assert caption_ranks(images, texts, [0, 1, 2, 0]).tolist() == [0, 1, 2, 2]  # what fits all alike finds none


def test_a_map_learned_from_pairs_finds_linear_relations() -> None:
    g = torch.Generator().manual_seed(0)
    features, weight = torch.randn(60, 20, generator=g), torch.randn(20, 5, generator=g)
    texts = features @ weight + 3
    learned = fit_caption_map(features[:50], texts[:50])
    error = (learned.images(features[50:]) - learned.texts(texts[50:])).square().mean()
    assert error < 0.02 * texts.var()


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> ExtractorOptions:
    """An extractor that knows colours, and the text of their names."""

    def texts(captions: list[str]) -> torch.Tensor:
        found = [next(value for name, value in COLOURS.items() if name in caption) for caption in captions]
        return torch.tensor(found, dtype=torch.float32) - 120

    extractor = Extractor(
        name="colours",
        compute=lambda images: Features(images.float().mean((2, 3)) - 120),
        about={},
        embed_texts=texts,
    )
    monkeypatch.setitem(EXTRACTORS, "colours", lambda options: extractor)
    return ExtractorOptions("colours")


def squares(names: list[str]) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), COLOURS[name.split()[1]], np.uint8) for name in names])


def figures(place: Path, options: ExtractorOptions, captions: list[str]) -> dict[str, float]:
    path = place.with_suffix(".txt")
    path.write_text("\n".join(captions))
    settings = MetricSettings(metrics=("clipscore", "retrieval"), captions=path)
    (found,) = judge_sets([str(place)], None, options, settings)
    return {name: figure.value for name, figure in found.figures.items()}


def test_shuffled_captions_and_mode_collapse_are_seen(colours: ExtractorOptions, tmp_path: Path) -> None:
    captions = CAPTIONS * 6
    np.savez(tmp_path / "own.npz", arr_0=squares(captions))
    own = figures(tmp_path / "own.npz", colours, captions)
    assert own["R@1"] == 1
    shuffled = figures(tmp_path / "own.npz", colours, captions[1:] + captions[:1])
    assert shuffled["R@1"] == 0
    assert shuffled["clipscore"] < own["clipscore"]
    np.savez(tmp_path / "collapse.npz", arr_0=squares(captions[:1]).repeat(24, 0))
    assert figures(tmp_path / "collapse.npz", colours, captions)["R@1"] == 0.25


def test_captions_come_from_a_file_a_folder_or_genevals_metadata(colours: ExtractorOptions, tmp_path: Path) -> None:
    for number, caption in enumerate(CAPTIONS):
        place = tmp_path / f"{number:05}" / "samples"
        place.mkdir(parents=True)
        Image.fromarray(squares([caption])[0]).save(place / "0000.png")
        (place.parent / "metadata.jsonl").write_text(json.dumps({"prompt": caption, "tag": "colors"}))
    settings = MetricSettings(metrics=("retrieval",))
    assert judge_sets([str(tmp_path)], None, colours, settings)[0].figures["R@1"].value == 1
    names = {f"{number:05}/samples/0000.png": CAPTIONS[0] for number in range(4)}
    (tmp_path / "captions.json").write_text(json.dumps(names))
    found = judge_sets([str(tmp_path)], None, colours, settings)[0]
    assert found.figures["R@1"][:1] == (1.0,)  # a single different caption is always found
    assert found.figures["R@1"].chance == 1
    (tmp_path / "captions.json").unlink()
    (tmp_path / "00000" / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="has no caption"):
        judge_sets([str(tmp_path)], None, colours, settings)


def test_what_does_not_fit_is_refused(
    colours: ExtractorOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = tmp_path / "enough.txt"
    enough.write_text("\n".join(CAPTIONS))
    np.savez(tmp_path / "a.npz", arr_0=squares(CAPTIONS))
    place, settings = str(tmp_path / "a.npz"), MetricSettings(metrics=("clipscore",))
    with pytest.raises(ConfigError, match="a: has no captions; give --captions FILE"):
        judge_sets([place], None, colours, settings)
    (tmp_path / "few.txt").write_text("a red square\n")
    with pytest.raises(DataError, match="1 captions for the 4 images of a"):
        judge_sets([place], None, colours, MetricSettings(metrics=("clipscore",), captions=tmp_path / "few.txt"))
    mute = Extractor(name="mute", compute=lambda images: Features(images.float().mean((2, 3))), about={})
    monkeypatch.setitem(EXTRACTORS, "mute", lambda options: mute)
    for metric, message in (
        ("clipscore", "--metrics clipscore needs --extractor clip, got mute"),
        ("retrieval", "give --extractor clip, or --shards FOLDER with training pairs"),
    ):
        given = MetricSettings(metrics=(metric,), captions=enough)
        with pytest.raises(ConfigError, match=message):
            judge_sets([place], None, ExtractorOptions("mute"), given)


def test_the_table_names_model_scale_prefix_and_chance(colours: ExtractorOptions, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=squares(CAPTIONS))
    (tmp_path / "a.txt").write_text("\n".join(CAPTIONS))
    settings = MetricSettings(metrics=("clipscore", "retrieval"), captions=tmp_path / "a.txt", caption_prefix="See")
    table = figures_table(judge_sets([str(tmp_path / "a.npz")], None, colours, settings))
    assert "(chance 0.25)" in table
    assert "2.5 x max(cos, 0), colours, prefix 'See'" in table
    assert "images" not in table  # no distance, so no figure of that name


@pytest.mark.slow
def test_a_tiny_clip_scores_as_transformers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers  # noqa: PLC0415  (slow to import)

    from tests.data_pipeline.encode.text_models import words  # noqa: PLC0415

    text = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text | {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 11},
            vision_config=vision | {"image_size": 28, "patch_size": 7},
            projection_dim=8,
        )
    ).eval()
    model.save_pretrained(tmp_path / "clip")
    words().save_pretrained(tmp_path / "clip")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    captions = ["red fox", "blue house in the snow in the snow", "a fox"]  # the second is longer than the model
    (tmp_path / "a.txt").write_text("\n".join(captions))
    argv = [str(tmp_path / "a.npz"), "--metrics", "clipscore", "--captions", str(tmp_path / "a.txt")]
    argv += ["--extractor", "clip", "--extractor-weights", str(tmp_path / "clip"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--device", "cpu"]) == 0
    assert "2.5 x max(cos, 0), clip clip, prefix 'A photo depicts'" in capsys.readouterr().out
    processor = transformers.CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    tokens = words()(
        [f"A photo depicts {caption}" for caption in captions],
        padding=True,
        truncation=True,
        max_length=8,
        return_tensors="pt",
    )
    with torch.no_grad():
        found = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=processor(list(pixels), return_tensors="pt")["pixel_values"],
        )
    cosines = (found.image_embeds * found.text_embeds).sum(1) / (
        found.image_embeds.norm(dim=1) * found.text_embeds.norm(dim=1)
    )
    written = json.loads((tmp_path / "out" / "a.figures.json").read_text())
    assert written["figures"]["clipscore"]["value"] == pytest.approx(
        float((2.5 * cosines.clamp(min=0)).mean()), abs=1e-5
    )
    assert written["protocol"]["captions"]["different"] == 3


@pytest.mark.slow
def test_the_packaged_extractor_finds_captions_until_images_are_spoiled(tmp_path: Path) -> None:
    """With a map learned from the training split of drawn shapes to the words of their captions."""
    shards = make_shards(tmp_path / "shards", 48, 32)
    split = ShardSet.open(shards, "unseen")
    images = split.codec_object().decode(split.batch(range(split.num_samples)).latent)
    own = (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    captions = list(split.batch(range(split.num_samples)).captions)
    noise = np.random.default_rng(0).integers(0, 256, own.shape, dtype=np.uint8)
    places, texts = [], tmp_path / "captions.txt"
    for name, pixels in {"own": own, "noise": noise, "collapse": own[:1].repeat(len(own), 0)}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
        places.append(str(tmp_path / f"{name}.npz"))
    texts.write_text("\n".join(captions))
    settings = MetricSettings(metrics=("retrieval",), captions=texts, pairs=shards)
    judged = judge_sets(places, None, ExtractorOptions("efficientnet-lite0"), settings)
    found = {each.samples: each.figures["R@1"] for each in judged}
    assert found["own"].value > 3 * found["own"].chance
    assert found["noise"].value < 0.5 * found["own"].value
    assert found["collapse"].value < 0.5 * found["own"].value
