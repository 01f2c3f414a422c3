"""A model of this project as a folder in the layout of diffusers: names, and config.json of its transformer.

    OUT/
      README.md                     model card
      model_index.json              names the pipeline and its transformer
      pipeline.py                   the pipeline, which carries x0_hat from step to step (sharpmoe/hub.py)
      transformer/
        config.json                 architecture; codec and text encoder, with the numbers of a fitted codec
        modeling_sharpmoe.py        the transformer (sharpmoe/hub.py)
        diffusion_pytorch_model.safetensors, or several files with an index

Tensors have the names of weights files. A single file is a weights file of this project too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.published.folder import read_json

OWN_CLASS = "SharpMoETransformer"  # in sharpmoe/hub.py
_PIPELINE_CLASS = "SharpMoEPipeline"
_MODEL_MODULE = "modeling_sharpmoe"
_CODE = '''"""{what} The code is in the package sharpmoe, of which this file is a reference."""

try:
    from sharpmoe.hub import {name}
except ImportError as error:
    raise ImportError(
        f"this model needs the packages sharpmoe and diffusers ({{error}}); install sharpmoe from its repository "
        "(README.md of this folder), then: pip install diffusers"
    ) from error

__all__ = ["{name}"]
'''
CODE_FILES = {  # path in the folder -> content
    "pipeline.py": _CODE.format(what="Draw images with a model of sharpmoe.", name=_PIPELINE_CLASS),
    f"transformer/{_MODEL_MODULE}.py": _CODE.format(what="The network of a model of sharpmoe.", name=OWN_CLASS),
}


def json_file_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file for people."""
    return json.dumps(content, indent=2) + "\n"


def own_index(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of model_index.json. sample: defaults of drawing, fields of `SampleConfig`."""
    return {
        "_class_name": ["pipeline", _PIPELINE_CLASS],
        "transformer": [_MODEL_MODULE, OWN_CLASS],
        "sample": dict(sample),
    }


def own_config(config: ModelConfig, meta: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of transformer/config.json. meta: what the header of a weights file says beside."""
    return {"_class_name": OWN_CLASS, "model": config.model_dump(mode="json"), "meta": dict(meta)}


def own_folder(path: str | Path) -> Path | None:
    """Return the folder of the transformer of a model of this project: `path`, or transformer/ in it; else None."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder if read_json(folder / "config.json").get("_class_name") == OWN_CLASS else None
    return None


def read_own_config(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """Return architecture and meta of a folder that `own_folder` has found. Raises CheckpointError."""
    place = folder / "config.json"
    content = read_json(place)
    try:
        meta = {str(key): str(value) for key, value in content["meta"].items()}
        return ModelConfig(**content["model"]), meta
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place}: holds an architecture that cannot be read; export it again") from error
