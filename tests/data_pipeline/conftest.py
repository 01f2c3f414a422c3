from pathlib import Path

import pytest

from tests.fixtures_data import tiny_autoencoder


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKL with random weights, saved as diffusers saves it."""
    return tiny_autoencoder(tmp_path_factory.mktemp("vae"))
