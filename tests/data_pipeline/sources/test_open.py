from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data_pipeline.sources.open as open_module
from data_pipeline.sources.fluent import FluentSource
from data_pipeline.sources.folders import ClassFolderSource
from data_pipeline.sources.open import SourceOptions, open_source
from data_pipeline.sources.tables import TableSource
from data_pipeline.sources.tars import TarSource
from sharpmoe.errors import DataError
from tests.fixtures_data import Listing, ShapesSource, listing


def listed(path: Path) -> Listing:
    return listing(open_source(SourceOptions(source=str(path))))


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(SourceOptions(source=str(tmp_path / "none")))
    with pytest.raises(DataError, match="no captioned image"):
        listed(tmp_path)


def test_each_source_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "captions.csv").write_text("file,caption\n")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"")
    found = {
        name: type(open_source(replace(options, source=str(tmp_path / name))))
        for name, options in {
            "classes": SourceOptions(source="", class_folders=True),
            "tables": SourceOptions(source=""),
            "tables/captions.csv": SourceOptions(source=""),
            "tars": SourceOptions(source=""),
            "tars/a.tar": SourceOptions(source=""),
        }.items()
    }
    assert list(found.values()) == [ClassFolderSource, TableSource, TableSource, TarSource, TarSource]
    assert isinstance(open_source(SourceOptions(source="fluent")), FluentSource)
    assert isinstance(open_source(SourceOptions(source=str(tmp_path))), TarSource)  # at any depth
    moments = SourceOptions(source=str(tmp_path / "classes"), moments=tmp_path)
    assert isinstance(open_source(moments), ClassFolderSource)


def test_a_source_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ShapesSource()
    monkeypatch.setattr(open_module, "SOURCES", (lambda options, path: toy if options.source == "toy" else None,))
    assert open_source(SourceOptions(source="toy")) is toy
    with pytest.raises(DataError, match="no such folder"):
        open_source(SourceOptions(source="fluent"))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("t.json", r"\(.json\) is not taken: save it as .jsonl"),
        ("t.zip", "expand it to a folder"),
        ("t.tar.gz", "expand it to a plain .tar"),
        ("t.xlsx", "save it as .csv"),
        ("a.PNG", "name the folder"),
        ("README", r"\(without suffix\) is not taken"),
    ],
)
def test_a_file_of_another_kind_is_named_so(name: str, how: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=how) as error:
        open_source(SourceOptions(source=str(tmp_path / name)))
    assert "--source takes" in str(error.value)
    assert "\n" not in str(error.value)


def test_suffixes_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "T.CSV").write_text("file,caption\n")
    (tmp_path / "T.TAR").write_bytes(b"")
    assert isinstance(open_source(SourceOptions(source=str(tmp_path / "T.CSV"))), TableSource)
    assert isinstance(open_source(SourceOptions(source=str(tmp_path / "T.TAR"))), TarSource)


def test_captioned_pictures_win_over_a_stray_tar(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "backup.tar").write_bytes(b"")
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["a.png"]
    assert [(entry.name, entry.beside) for entry in found.skipped] == [("deep/backup.tar", True)]
