import json
from pathlib import Path

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.zero.config import resolve_ds_config

STAGE3 = {"stage": 3}


@pytest.fixture
def ds_file(tmp_path: Path):
    def write(content: object) -> Path:
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def run_config(**sections: dict) -> RunConfig:
    return RunConfig.model_validate({"train": {"global_batch": 24}, **sections})


def refusal(path: Path, run: RunConfig | None = None, world: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(path, run or run_config(), world)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_run_file_fills_in_its_keys(ds_file):
    run = run_config(train={"global_batch": 24, "micro_batch": 3, "precision": "bf16"}, optim={"clip_norm": 0.5})
    resolved = resolve_ds_config(ds_file({"zero_optimization": STAGE3, "bf16": {"check_grad_overflow": False}}), run, 4)
    assert resolved == {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": STAGE3,
        "bf16": {"check_grad_overflow": False, "enabled": True},
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }
    assert json.loads(json.dumps(resolved)) == resolved


def test_the_batch_follows_the_real_world_size(ds_file):
    path = ds_file({"zero_optimization": STAGE3})
    micro = [resolve_ds_config(path, run_config(), world)["train_micro_batch_size_per_gpu"] for world in (1, 2, 3)]
    assert micro == [24, 12, 8]
    assert "24" in refusal(path, world=5)


def test_a_hugging_face_file_with_auto_values_is_resolved(ds_file):
    path = ds_file(
        {
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                **STAGE3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
    )
    resolved = resolve_ds_config(path, run_config(model={"width": 100, "num_heads": 4}), 2)
    assert resolved["zero_optimization"] == {
        **STAGE3,
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 9_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    assert resolved["train_micro_batch_size_per_gpu"] == 12
    assert resolved["bf16"] == {"enabled": False}
    assert "fp16" not in resolved
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"zero_optimisation": STAGE3}, ["unknown key zero_optimisation", "did you mean zero_optimization?"]),
        ({"train_batchsize": 4}, ["unknown key train_batchsize", "did you mean train_batch_size?"]),
        ({"xyzzy": 4}, ["unknown key xyzzy", "allowed: aio, bf16"]),
        ({"zero_optimization": {"stge": 3}}, ["zero_optimization.stge", "did you mean stage?"]),
        (
            {"zero_optimization": {**STAGE3, "offload_optimizer": {"devise": "cpu"}}},
            ["zero_optimization.offload_optimizer.devise", "did you mean device?"],
        ),
        ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage is 1", "allowed: 2 | 3"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage is missing, which DeepSpeed takes for 0"]),
        ({}, ["zero_optimization.stage is missing"]),
        ({"zero_optimization": True}, ["zero_optimization is True", "expected an object"]),
        (
            {"zero_optimization": {**STAGE3, "reduce_bucket_size": -1}},
            ["zero_optimization.reduce_bucket_size is -1", "greater than 0"],
        ),
        ({"zero_optimization": {**STAGE3, "overlap_comm": "auto"}}, ["overlap_comm", '"auto"', "reduce_bucket_size"]),
        (
            {"zero_optimization": {**STAGE3, "zero_hpz_partition_size": 8}},
            ["hpz_partition_size is 8", "allowed: 1"],
        ),
        ({"zero_optimization": {**STAGE3, "offload_optimizer": {"device": "nvme"}}}, ["nvme", "allowed: 'cpu'"]),
        ({"zero_optimization": {**STAGE3, "offload_param": {"device": "nvme"}}}, ["offload_param", "nvme"]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["zero_optimization.offload_param is for stage 3", "set stage to 3, or remove it"],
        ),
        (
            {"zero_optimization": {**STAGE3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ["offload_optimizer.ratio is 0.5, allowed: 1.0", "remove it"],
        ),
        (
            {"zero_optimization": {**STAGE3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            ["offload_optimizer.super_offload is True, allowed: False"],
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm is False", "the norm"]),
        (
            {"zero_optimization": STAGE3, "data_types": {"buffer_dtype": "bf16"}},
            ["data_types.buffer_dtype is 'bf16'", "allowed: None", "float32"],
        ),
        ({"use_data_before_expert_parallelism": True}, ["cannot be set here", "parallel.ep_size"]),
        ({"dump_state": "auto"}, ["dump_state", '"auto"']),
        ({"train_batch_size": 8}, ["train_batch_size belongs to the run file", "train.global_batch"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping belongs to the run file", "optim.clip_norm"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer belongs to the run file", "optim.name"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optim.schedule"]),
        ({"steps_per_print": 10}, ["steps_per_print", "log.every"]),
        ({"fp16": {"enabled": True}}, ["fp16 belongs to the run file", "train.precision"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled belongs to the run file", "train.precision"]),
        ({"checkpoint": {"load_universal": True}}, ["checkpoint cannot be set here", "run file"]),
        ({"elasticity": {}}, ["elasticity cannot be set here", "removed"]),
        ({"aio": {"blocksize": 1}}, ["aio.blocksize", "did you mean block_size?"]),
        ([1], ["holds a list", "expected an object"]),
        ('{"zero_optimization": {"stage": 3,}}', ["not valid JSON", "line 1 column"]),
        ('{"bf16": {}, "bf16": {}}', ["key bf16 is given twice"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_mend(ds_file, content, words):
    message = refusal(ds_file(content))
    assert [word for word in ["zero.json", *words] if word not in message] == [], message


def test_a_missing_file_lists_its_neighbours(ds_file):
    path = ds_file({})
    assert "holds zero.json" in refusal(path.with_name("zero4.json"))
