from pathlib import Path

import pytest
import torch

from tests.data_pipeline.encode.text_models import clip, letters, qwen, t5, words


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text models and their tokenizers, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    made = {"t5": (t5(), words()), "clip": (clip(), words()), "clip_g": (clip(projection=True), words())}
    for name, (model, tokenizer) in {**made, "qwen": (qwen(), letters())}.items():
        model.eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
