import pytest

from sharpmoe.study import table
from tests.study.toy import Figures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figures]:
    """Give the arms of the toy study these figures, whatever is on the disk."""
    found: dict[str, Figures] = {
        "plain": {
            "flow": {0: [1.0, 2.0], 1: [1.5, 2.5]},
            "corr": {0: [0.1, 0.2], 1: [0.1, 0.4]},
            "fd, cfg 1": {0: [3.0], 1: [3.5]},
        },
        "steered": {
            "flow": {0: [1.1, 2.3], 1: [1.7, 2.3]},
            "corr": {0: [0.5, 0.6], 1: [0.5, 0.4]},
            "fd, cfg 1": {0: [4.0], 1: [4.4]},
        },
    }
    monkeypatch.setattr(table, "_values_of", lambda study, arm, split: found[arm.name])
    return found
