from pathlib import Path

import pytest
import torch

from tests.data_pipeline.encode.text_models import clip, conversations, letters, llama, qwen, qwen3_vl, t5, words


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


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Causal language models with a chat template: alone, and as a pipeline of diffusers has them."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    qwen3_vl().eval().save_pretrained(folder / "pipeline" / "text_encoder")
    conversations().save_pretrained(folder / "pipeline" / "processor")
    llama().eval().save_pretrained(folder / "llama")
    conversations().save_pretrained(folder / "llama")
    return folder
