"""Facts of a check: one JSON object per line, on the disk as soon as it is known."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fact = Mapping[str, Any]


class Facts:
    """A file of facts that one process appends to."""

    def __init__(self, file: Path, quiet: bool = False) -> None:
        self._file, self._quiet = file, quiet
        file.parent.mkdir(parents=True, exist_ok=True)

    def tell(self, **fact: Any) -> None:
        """Append a fact and print it unless quiet; a process that is killed loses none that it has told."""
        line = json.dumps(fact)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        if not self._quiet:
            print(line, flush=True)


def read_facts(file: Path) -> list[Fact]:
    """Return the facts of a file, none where there is none; the line that a killed process left half is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
