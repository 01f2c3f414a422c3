"""The page of `sharpmoe demo`: the function behind it, and what a browser shows of it."""

import builtins
import shutil
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest

from launcher import demo
from sharpmoe.errors import ConfigError
from sharpmoe.report.demo import DemoModel, open_page, serve_page
from tests.report.run_folder import make_run_folder

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> DemoModel:
    folder = make_run_folder(tmp_path_factory.mktemp("work"))
    return demo._opened(demo.main.parse([str(folder)]))


def test_one_image_with_and_without_saliency_routers(opened: DemoModel) -> None:
    on, off, sheet, message = opened.draw("a green circle", 1, 2.0, 3)
    assert message == ""
    assert on is not None
    assert sheet is not None
    assert on.shape[2] == 3
    assert (off is not None) == opened.has_routers
    assert (opened.draw("a green circle", 1, 2.0, 3)[0] == on).all()
    assert (opened.draw("a green circle", 2, 2.0, 3)[0] != on).any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("  ", 1, 2.0, 3), "error: the caption is empty; write what to draw"),
        (("a", None, 2.0, 3), "error: seed is None, expected a whole number"),
        (("a", 1, 2.0, 9999), "error: steps is 9999, allowed here: 1 to 250"),
        (("a", -1, 2.0, 3), "sample.seed"),
    ],
)
def test_mistakes_are_one_line_on_the_page(opened: DemoModel, given: tuple, said: str) -> None:
    *images, message = opened.draw(*given)
    assert images == [None, None, None]
    assert said in message
    assert "\n" not in message


def test_without_gradio_the_extra_is_named(opened: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *rest: object, **more: object) -> object:
        if name == "gradio":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ConfigError, match="the extra `demo`"):
        open_page(opened)


@pytest.mark.slow
def test_a_browser_shows_the_page(opened: DemoModel, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    said: list[str] = []
    page = serve_page(opened, None, said.append, wait=False)
    try:
        address = page.local_url
        assert address.startswith("http://127.0.0.1:")
        assert address in said[0]
        with urlopen(address) as answer:
            assert opened.name in answer.read().decode()
        if BROWSER is None:
            pytest.skip("no Chromium")
        words = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
        dump = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
        for label in ("caption", "seed", "guidance", "steps", "Draw", "experts per token"):
            assert label in dump.stdout
    finally:
        page.close()
