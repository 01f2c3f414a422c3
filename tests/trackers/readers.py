"""What trackers have written, read back from their local stores: figures, settings, pictures, tables."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass
class Found:
    """The contents of one run."""

    figures: dict[str, list[int]] = field(default_factory=dict)  # tag -> steps, in the order of writing
    settings: dict[str, Any] = field(default_factory=dict)
    media: set[str] = field(default_factory=set)  # tags of pictures, tables and text
    text: str = ""  # everything that was stored, to search for what must not be there


def read_mlflow(store: Path, run_id: str) -> Found:
    mlflow_store = import_module("sharpmoe.trackers.mlflow_store")  # an optional package
    client, found = mlflow_store.MlflowClient(tracking_uri=store.absolute().as_uri()), Found()
    run = client.get_run(run_id)
    found.settings, found.text = dict(run.data.params), json.dumps(run.to_dictionary())
    for tag in run.data.metrics:
        found.figures[tag] = [point.step for point in client.get_metric_history(run_id, tag)]
    found.media = {each.path for each in client.list_artifacts(run_id)}
    return found


def read_trackio(folder: Path, name: str) -> Found:
    found = Found()
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select step, cast(metrics as text) from metrics where run_name = ? order by id", (name,)
        ).fetchall()
        wanted = "select cast(config as text) from configs where run_name = ?"
        ((settings,),) = connection.execute(wanted, (name,)).fetchall()
    connection.close()
    found.settings = json.loads(settings)
    found.text = settings + "".join(metrics for _, metrics in rows)
    for step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            if isinstance(value, int | float):
                found.figures.setdefault(tag, []).append(step)
            else:
                found.media.add(tag)
    return found


def read_wandb(folder: Path) -> Found:
    """Read all offline parts of a run, the oldest first, as `wandb sync` would."""
    wandb_internal_pb2 = import_module("wandb.proto.wandb_internal_pb2")  # an optional package
    found, ids = Found(), set[str]()
    for part in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for blob in _records(part.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(blob)
            found.text += str(record)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                found.settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if kind == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                for tag, value in items.items():
                    if isinstance(value, int | float) and not tag.startswith("_"):
                        found.figures.setdefault(tag, []).append(items["_step"])
                    elif isinstance(value, dict):
                        found.media.add(tag)
                    elif "." in tag:
                        found.media.add(tag.partition(".")[0])
    assert len(ids) == 1  # one run, in several parts
    return found


def _records(blob: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB, in them crc, length and kind (1: whole, 2-4: parts)."""
    position, parts = 7, b""  # after the header of the file
    while position + 7 <= len(blob):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", blob[position : position + 7])
        data = blob[position + 7 : position + 7 + length]
        position += 7 + length
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            yield parts
