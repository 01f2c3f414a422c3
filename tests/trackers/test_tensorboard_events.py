"""TensorBoard's event files: the order of its charts, and the settings beside them."""

import io
import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sharpmoe.log_file import read_log
from sharpmoe.train.runlog import RunLog
from tests.train.test_runlog import next_second, stats, validated


def layout_of(folder: Path) -> Layout:
    """The layout of the tab "Custom Scalars" that TensorBoard shows: the last one."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return Layout.FromString(events.Tensors(CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])


def test_tensorboard_shows_first_how_a_run_goes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 4, every=1, stream=io.StringIO())
    for step in (1, 2, 3):
        log.step(stats(step), {"saliency_spread_t<0.35/layer0": 0.0})
        log.validation(step, validated(0.5))
    log.close()
    layout = layout_of(tmp_path)
    titles = [section.title for section in layout.category]
    assert titles == ["Loss", "Validation", "Learning rate", "Throughput", "Saliency routers, by layer and t"]
    tags = list(read_log(tmp_path / "log.jsonl"))
    charts = [chart for section in layout.category for chart in section.chart]
    assert all(any(re.match(pattern, tag) for tag in tags) for chart in charts for pattern in chart.multiline.tag)
    assert [chart.title for chart in layout.category[2].chart] == ["learning rate"]  # no weight of the routing loss
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Tensors(CONFIG_SUMMARY_TAG)) == 2  # with the first figures and with the first validation
    next_second()
    again = RunLog(tmp_path, 4, first_step=4, every=1, stream=io.StringIO())
    again.step(stats(4))  # its tags alone would leave out the validation
    again.close()
    assert layout_of(tmp_path) == layout


def test_the_settings_are_on_the_tab_of_hyperparameters(tmp_path: Path) -> None:
    settings = {"train.seed": 7, "optim.betas": [0.9, 0.95], "loss.mass_spread": None, "version.torch": "2"}
    RunLog(tmp_path, 1, stream=io.StringIO(), settings=settings).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(values) == {"train.seed", "optim.betas", "loss.mass_spread"}  # what a comparison of runs is about
    assert values["train.seed"].number_value == 7
    assert values["optim.betas"].string_value == "[0.9, 0.95]"
    assert values["loss.mass_spread"].string_value == "None"
