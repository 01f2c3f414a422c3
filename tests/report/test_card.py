"""Model cards say what weights and run folder say, and that the rest is not recorded."""

from pathlib import Path

import yaml

from sharpmoe.evaluation.allocation import measure_allocation
from sharpmoe.log_file import LogWriter
from sharpmoe.model.weights import load_model
from sharpmoe.report.card import model_card
from sharpmoe.report.runs import find_saved_model
from tests.report.run_folder import make_run_folder
from tests.toys import ToySamples, toy_model


def card_of(folder: Path, **meta: str) -> str:
    saved = find_saved_model(folder)
    model, header = load_model(saved.weights)
    origin = {
        "codec": '{"kind": "autoencoder_kl", "name": "/home/me/sd-vae", "sha256": "0123456789abcdef"}',
        "encoder": '{"kind": "transformers", "name": "clip"}',
    }
    return model_card(saved, model.config, {**header, **meta}, origin, model.count_parameters())


def test_a_card_has_the_figures_of_the_run_and_no_others(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "work")
    card = card_of(folder)
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert "| optimizer steps | not recorded |" in card
    assert "| held-out flow loss | not recorded |" in card
    assert "Not recorded (`log.allocation` of the run)." in card
    assert "| started from | `base.safetensors` |" in card
    assert "places={'/home/me/sd-vae': ..., 'clip': ...}" in card
    assert str(tmp_path) not in card

    result = measure_allocation(toy_model(), ToySamples(6), images=6)
    result.save(folder / "allocation" / "before.json")
    log = LogWriter(folder, "one")
    log.event(0, "start", {"time": "2026-01-02T03:04:05+0000", "settings": {"version.torch": "2.13.0"}})
    log.figures(0, {"validation/flow": 1.25})
    log.figures(2, {"validation/flow": 0.75})
    log.close()
    card = card_of(folder, step="2", samples="512", weights="ema")
    assert "| optimizer steps | 2 |" in card
    assert "| training images seen | 512 |" in card
    assert "| weights | averaged (ema) |" in card
    assert "1.2500 (step 0) to 0.7500 (step 2)" in card
    assert "torch 2.13.0" in card
    assert f"{result.saliency['all t'].mean:.4f}" in card
    assert "After: not recorded." in card
    result.save(folder / "allocation" / "after.json")
    assert "change (paired)" in card_of(folder)
    assert "| held-out split | unseen |" in card
    assert "| images of the flow loss | up to " in card, "a small split has fewer than log.validation_images"
    run = folder / "config.yaml"
    run.write_text(run.read_text().replace("validation_split: unseen", "validation_split: train"))
    assert "| held-out split | none: measured on train |" in card_of(folder)
