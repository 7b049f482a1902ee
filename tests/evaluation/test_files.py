# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is written appears whole or not at all, and leaves nothing else."""

import pytest

from evaluation.files import read_mapping, remove_leftovers, replace_folder, write_file


def test_a_file_takes_the_place_of_the_one_before_and_nothing_stays_beside_it(tmp_path):
    for text in ("one", "ü"):
        write_file(tmp_path / "deeper" / "file", text)
    assert [place.name for place in (tmp_path / "deeper").iterdir()] == ["file"]
    assert (tmp_path / "deeper" / "file").read_text(encoding="utf-8") == "ü"


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path):
    write_file(tmp_path / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "half \ud800")
    assert [place.name for place in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_folder_that_cannot_be_filled_leaves_the_one_before(tmp_path):
    replace_folder(tmp_path / "out", lambda place: (place / "old").touch())

    def write(place):
        (place / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        replace_folder(tmp_path / "out", write)
    assert [place.relative_to(tmp_path).as_posix() for place in tmp_path.rglob("*")] == ["out", "out/old"]
    replace_folder(tmp_path / "out", lambda place: (place / "new").touch())
    assert [place.relative_to(tmp_path).as_posix() for place in tmp_path.rglob("*")] == ["out", "out/new"]


def test_only_leftovers_of_the_names_are_removed(tmp_path):
    (tmp_path / f".cell[1].{'0a' * 16}").mkdir()
    (tmp_path / f".cell[1].{'0a' * 16}" / "half").touch()
    kept = {".cell[1].mine", f".other.{'0a' * 16}", f"cell[1].{'0a' * 16}"}
    for name in kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, ["cell[1]"])
    assert {place.name for place in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read .* No such file"), ("a: b: c", "not YAML"), ("- a", "must hold a mapping")],
)
def test_what_is_no_mapping_is_told(text, message, tmp_path):
    if text is not None:
        (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mapping(tmp_path / "file")
