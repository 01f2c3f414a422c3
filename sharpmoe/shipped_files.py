"""Files that come with the package: run files and engine files in configs/, the base in assets/. No torch."""

from pathlib import Path

_FOLDERS = ("configs", "assets")
_COPY = Path(__file__).with_name("shipped")  # setup.py copies the folders there when a wheel is built
IS_INSTALLED = _COPY.is_dir()  # this is a package without a checkout around it
SHIPPED_ROOT = _COPY if IS_INSTALLED else Path(__file__).resolve().parents[1]  # holds configs/ and assets/


def find_shipped(name: str | Path) -> Path:
    """Return the path `name`, or the package's own file where the working folder has none of that name.

    Only names below configs/ and assets/ are looked up in the package: `configs/zero3.json` means that file in any
    working folder, with or without a checkout. What exists in neither place stays as given, for the caller's message.
    """
    path = Path(name)
    if path.parts[:1] and path.parts[0] in _FOLDERS and not path.exists() and (SHIPPED_ROOT / path).exists():
        return SHIPPED_ROOT / path
    return path
