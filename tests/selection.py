"""Which cases a fixture has to prepare: those of the tests that were selected."""

from typing import Any

import pytest


def selected(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """Return the values that `parameter` takes in the selected tests of this file, each once, in their order.

    A fixture that trains all cases of a file together trains no more than `-m` and `-k` leave.
    """
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(test.callspec.params[parameter] for test in tests if parameter in test.callspec.params))


def sweep(values: Any, usual: Any) -> list[Any]:
    """Return `values` as parameters, all but the `usual` ones marked as a sweep."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.sweep) for value in values]
