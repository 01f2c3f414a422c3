"""A run folder with one checkpoint of random weights."""

from pathlib import Path

import torch

from sharpmoe.config import CheckpointConfig, DataConfig, LogConfig, RunConfig, SampleConfig, TrainConfig
from sharpmoe.config_io import dump_run_config
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.weights import save_weights
from tests.fixtures_data import make_shards
from tests.toys import toy_model


def make_run_folder(root: Path, model: Backbone | None = None, init: str = "base.safetensors") -> Path:
    """Write root/toy, a run of two steps of a toy model; the EMA weights and the live weights differ."""
    shards = make_shards(root / "shards")
    model = model or toy_model("diffmoe", text_width=32, pooled_width=32)
    run = RunConfig(
        name="toy",
        output=str(root),
        model=model.config,
        data=DataConfig(shards=str(shards)),
        sample=SampleConfig(captions=("a red circle", "a blue square"), num_steps=2),
        log=LogConfig(
            validate_every=1,
            validation_images=3,
            sample_every=int(model.config.conditioning == "text"),
            allocation_images=3,
        ),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig(every=0, init=init),
    )
    checkpoint = root / "toy" / "checkpoints" / "step00000002"
    save_weights(checkpoint / "ema.safetensors", model.state_dict(), model.config)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        parameters.get("final_layer.linear.bias", [*parameters.values()][-1]).add_(0.5)
    save_weights(checkpoint / "live.safetensors", model.state_dict(), model.config)
    (root / "toy" / "checkpoints" / "latest").write_text("step00000002\n")
    (root / "toy" / "config.yaml").write_text(dump_run_config(run))
    return root / "toy"
