"""`python -m launcher NAME ...` is `sharpmoe NAME ...`."""

from launcher.main import run

if __name__ == "__main__":
    run()
