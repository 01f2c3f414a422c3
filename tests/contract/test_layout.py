"""Tests mirror the tree: sharpmoe/a/b.py is tested by tests/a/test_b.py, data_pipeline and launcher likewise.

`test_b_part.py` beside it, or in its place, is of the same module. A module without a file of its own is in ELSEWHERE
with the file that tests it.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("sharpmoe", "data_pipeline", "launcher")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)
ELSEWHERE = {  # module -> file under tests/ that tests it, and why there
    # what a checkpoint is made of, seen from saving and loading one
    "sharpmoe/checkpoint/manifest.py": "checkpoint/test_load.py",
    "sharpmoe/checkpoint/adapters.py": "train/test_trainable.py",
    "sharpmoe/checkpoint/retention.py": "checkpoint/test_save.py",
    "sharpmoe/checkpoint/rng.py": "checkpoint/test_save.py",
    "sharpmoe/checkpoint/state.py": "checkpoint/test_load.py",
    # read with the schema they fill
    "sharpmoe/config_io.py": "test_config.py",
    "sharpmoe/config_model.py": "test_config.py",
    # types without behaviour
    "sharpmoe/errors.py": "train/test_loop.py",
    "sharpmoe/moe/routing.py": "moe/test_selection.py",
    "sharpmoe/trackers/record.py": "trackers/test_registry.py",
    "sharpmoe/train/tally.py": "test_rollout.py",
    "data_pipeline/schema.py": "data_pipeline/read/test_stream.py",
    # parts of a model, seen from whole models
    "sharpmoe/architectures.py": "model/test_backbone.py",
    "sharpmoe/model/published/own.py": "test_hub.py",
    "sharpmoe/model/published/export.py": "model/published/test_folder.py",
    "sharpmoe/model/published/nucleus.py": "model/test_nucleus.py",
    "sharpmoe/model/attach.py": "model/published/test_load.py",
    "sharpmoe/model/build.py": "model/test_backbone.py",
    "sharpmoe/model/initial.py": "parallel/zero/test_build.py",
    "sharpmoe/model/published/names.py": "model/published/test_load.py",
    "sharpmoe/model/published/sizes.py": "model/published/test_load.py",
    "sharpmoe/moe/layer.py": "moe/test_counters.py",
    "sharpmoe/moe/pool.py": "moe/test_thresholds.py",
    "sharpmoe/moe/products.py": "moe/test_experts.py",
    # only in the company of ranks
    "sharpmoe/parallel/experts/exchange.py": "parallel/experts/test_dispatch.py",
    "sharpmoe/parallel/experts/groups.py": "parallel/experts/test_expert_parallel.py",
    "sharpmoe/parallel/experts/megatron.py": "contract/test_megatron_dispatcher.py",
    "sharpmoe/parallel/experts/pool.py": "parallel/experts/test_expert_parallel.py",
    "sharpmoe/parallel/zero/ema.py": "parallel/zero/test_engine.py",
    "sharpmoe/parallel/zero/partitions.py": "checkpoint/test_load.py",
    "sharpmoe/parallel/zero/placement.py": "parallel/experts/test_expert_parallel.py",
    # summands of one plan, compared with what a step allocates and sends
    "sharpmoe/planning/coordinator.py": "planning/test_gathers.py",
    "sharpmoe/planning/estimate.py": "planning/test_counted.py",
    "sharpmoe/planning/layout.py": "planning/test_gathers.py",
    "sharpmoe/planning/memory.py": "planning/test_counted.py",
    "sharpmoe/planning/table.py": "launcher/test_plan.py",
    "sharpmoe/planning/traffic.py": "planning/test_counted.py",
    # seen in the pages and pictures of the launcher that writes them
    "sharpmoe/report/comparison.py": "launcher/test_evaluate.py",
    "sharpmoe/report/weights_difference_table.py": "launcher/test_diff.py",
    "sharpmoe/evaluation/metrics.py": "evaluation/test_sample_metrics.py",
    "sharpmoe/evaluation/routing_record.py": "planning/test_replay.py",
    # parts of the page of a report
    **{
        f"sharpmoe/report/{part}.py": "report/test_page.py"
        for part in ("charts", "maps", "markup", "page_style", "run_table")
    },
    "sharpmoe/report/demo.py": "launcher/test_demo.py",
    # stages of a run, seen from whole runs
    "sharpmoe/train/local_gradients.py": "train/test_rollout_schedules.py",
    "sharpmoe/train/session.py": "train/test_loop.py",
    # steps of preparing and reading, seen from whole shard sets
    "data_pipeline/identity.py": "data_pipeline/encode/test_build.py",
    "data_pipeline/prepare/encoding.py": "data_pipeline/prepare/test_write.py",
    "data_pipeline/prepare/estimate.py": "launcher/test_prepare.py",
    "data_pipeline/prepare/finish.py": "data_pipeline/prepare/test_write_killed.py",
    "data_pipeline/prepare/merge.py": "data_pipeline/prepare/test_ranks.py",
    "data_pipeline/prepare/survey.py": "data_pipeline/sources/test_tables.py",
    "data_pipeline/read/batches.py": "data_pipeline/read/test_shards.py",
    "data_pipeline/read/folder.py": "data_pipeline/read/test_shards.py",
    "data_pipeline/read/mixture.py": "data_pipeline/read/test_stream.py",
    "data_pipeline/read/samples.py": "data_pipeline/read/test_shards.py",
    "data_pipeline/read/stats.py": "launcher/test_shards.py",
    "data_pipeline/read/verify.py": "launcher/test_shards.py",
    "data_pipeline/sources/captions.py": "data_pipeline/sources/test_folders.py",
    "data_pipeline/sources/embedded.py": "data_pipeline/sources/test_tables.py",
    "data_pipeline/sources/files.py": "data_pipeline/sources/test_items.py",
    "data_pipeline/sources/rows.py": "data_pipeline/sources/test_tables.py",
    "data_pipeline/sources/walk.py": "data_pipeline/sources/test_folders.py",
    "data_pipeline/store/http_ranges.py": "data_pipeline/store/test_remote.py",
    "data_pipeline/store/ranges.py": "data_pipeline/store/test_remote.py",
    # run as programs
    "sharpmoe/shipped_files.py": "contract/test_wheel.py",
    "launcher/__main__.py": "launcher/test_main.py",
    "launcher/hold_signals.py": "slurm/test_jobs.py",
}


def own_tests(module: Path) -> list[Path]:
    """The test files that are named after a module."""
    inside = module.relative_to("sharpmoe") if module.parts[0] == "sharpmoe" else module
    folder = ROOT / "tests" / inside.parent
    return [*folder.glob(f"test_{inside.stem}.py"), *folder.glob(f"test_{inside.stem}_*.py")]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_its_tests(module: Path) -> None:
    elsewhere = ELSEWHERE.get(str(module))
    if elsewhere is None:
        inside = module.relative_to("sharpmoe") if module.parts[0] == "sharpmoe" else module
        wanted = Path("tests") / inside.parent / f"test_{inside.name}"
        assert own_tests(module), f"{module} has no {wanted}; write it, or list in ELSEWHERE what tests the module"
    else:
        assert not own_tests(module), f"{module} has tests of its own; take it out of ELSEWHERE"
        assert (ROOT / "tests" / elsewhere).is_file(), f"ELSEWHERE: tests/{elsewhere} does not exist"


def test_no_module_is_listed_that_is_gone() -> None:
    assert sorted(ELSEWHERE.keys() - {str(module) for module in MODULES}) == []
