"""`python -m launcher NAME ...` is `sharpmoe NAME ...`."""

import launcher.startup  # noqa: F401 - before what needs the packages
from launcher.main import run

if __name__ == "__main__":
    run()
