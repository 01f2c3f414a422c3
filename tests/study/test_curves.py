"""Points and picture of alignment against quality."""

from pathlib import Path

import numpy as np
import pytest

from sharpmoe.study.curves import curve_points, draw_curves
from sharpmoe.study.plan import load_study
from sharpmoe.study.table import make_table
from tests.study.toy import Figures, make_study


def test_every_arm_has_a_point_in_every_plane(tmp_path: Path, figures: dict[str, Figures]) -> None:
    study = load_study(make_study(tmp_path))
    curves = curve_points(study, make_table(study, "tuning"))
    assert curves["figures"] == ["flow", "fd, cfg 1"]
    assert curves["points"]["plain"]["fd, cfg 1"]["seeds"] == {"0": 3.0, "1": 3.5}
    assert curves["points"]["plain"]["fd, cfg 1"]["difference"] is None
    assert curves["points"]["steered"]["corr"]["level"]["mean"] == pytest.approx(0.5)


def test_the_picture_shows_the_figures_and_one_seed_alone(tmp_path: Path, figures: dict[str, Figures]) -> None:
    study = load_study(make_study(tmp_path))
    before = draw_curves(study, make_table(study, "tuning"))
    figures["steered"]["fd, cfg 1"] = {0: [3.0]}
    after = draw_curves(study, make_table(study, "tuning"))
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
