"""A name that is no model is refused within seconds, after one request to the Hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from data_pipeline.encode.hub import check_model_is_had
from data_pipeline.encode.transformer_texts import TransformerTextEncoder
from sharpmoe.errors import DataError


def test_one_question_with_a_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, float]] = []

    def refuse(url: str, timeout: float, **_: Any) -> None:
        asked.append((url, timeout))
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(DataError, match="text encoder nothere: cannot be loaded .no such folder here, and the Hub"):
        TransformerTextEncoder("nothere", 8)
    ((url, timeout),) = asked
    assert "nothere" in url
    assert timeout <= 10
    check_model_is_had(str(tmp_path))  # a folder
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    check_model_is_had("nothere")
    assert len(asked) == 1
