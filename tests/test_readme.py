# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What the README, CONTRIBUTING and the pages of docs/ tell their readers to type works.

A block is run as it stands, with a tiny model where it names a real one. Where that would need a hub, a GPU or an hour,
an HTML comment right before it says so, ``<!-- needs: hub -->``, and only its flags are checked.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from extras import needs_extra
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf", reason="needs gguf, of the extra 'eval'")
from evaluation.__main__ import COMMANDS, main
from evaluation.cli import Parser
from evaluation.models import BUILT_IN_MODEL, built_in_model_folder
from kvpress_merging.__main__ import main as check_environment

pytestmark = needs_extra("eval")

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
NEEDS = {"hub", "gpu", "hour"}

LITTLE_WORK = {
    "demo": "--n_contexts=1 --context_length=128 --continuation_length=2 --device=cpu --quiet",
    "gpu": "--quick",
    "run": "--n_samples=1 --data_dir=512 --device=cpu --quiet",
    "speed": "--k_len 64 --num_key_value_heads 1 --compression_ratio 0.5 --dtype float32 --repeats 1",
    "sweep": "--dry_run",
}
"""Flags that come after those of a command and win over them."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, what it needs, and what stands in it."""

    file: str
    line: int
    language: str
    needs: frozenset[str]
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read_blocks(file: str, text: str) -> list[Block]:
    """All fenced blocks, at whatever depth they are indented."""
    blocks = []
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        before = text[: match.start()].rstrip().splitlines()
        comment = re.fullmatch(r"\s*<!-- needs: ([\w, ]+) -->", before[-1]) if before else None
        needs = frozenset(re.split(r",\s*", comment.group(1))) if comment else frozenset()
        body = re.sub(rf"^{match.group(1)}", "", match.group(3), flags=re.M)
        blocks.append(Block(file, text[: match.start()].count("\n") + 1, match.group(2), needs, body))
    return blocks


def commands(text: str) -> list[list[str]]:
    """A shell block's commands as their words, without comments and without variables set for one command."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for words in (shlex.split(line, comments=True) for part in lines for line in part.split(" && ")):
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


BLOCKS = [block for file in FILES for block in read_blocks(file, (ROOT / file).read_text(encoding="utf-8"))]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]


@pytest.fixture(scope="module")
def tokenizer():
    # The real one: how many tokens a text has decides what fits into a context.
    return AutoTokenizer.from_pretrained(built_in_model_folder())


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder from which the checkout's files can be read, and into which results are written."""
    for name in ("evaluation", "src", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


def test_blocks_are_found_with_what_they_need_and_their_commands():
    text = "One.\n\n<!-- needs: hub, gpu -->\n```bash\nA=1 make demo  # why\nx \\\n  --flag 'a b' && y\n```\n"
    text += "- two:\n  ```python\n  1\n  ```\n"
    shell, python = read_blocks("f", text)
    assert (shell.place, shell.language, shell.needs) == ("f:4", "bash", {"hub", "gpu"})
    assert commands(shell.text) == [["make", "demo"], ["x", "--flag", "a b"], ["y"]]
    assert (python.language, python.needs, python.text) == ("python", frozenset(), "1\n")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_says_what_it_is_and_needs_what_can_be_needed(block):
    assert block.needs <= NEEDS, f"{block.place}: needs must be among {', '.join(sorted(NEEDS))}"
    assert block.language or not re.search(r"^\s*(import |from .* import|make |pip |python )", block.text, re.M)


@pytest.mark.real_model
@pytest.mark.parametrize("file", [file for file in FILES if "```python" in (ROOT / file).read_text()])
def test_the_python_of_a_file_runs_from_its_first_block_to_its_last(file, model, tokenizer, checkout, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    context = "The keeper counted the ships every evening. On Monday there were seven, on Tuesday there were nine. " * 4
    names = {
        "__name__": "__main__",
        "model": model,
        "tokenizer": tokenizer,
        "context": context,
        "question": "How many ships were there on Monday?",
        "input_ids": tokenizer(context, return_tensors="pt").input_ids,
    }
    python = [block for block in BLOCKS if block.file == file and block.language in ("python", "py")]
    assert python
    for block in python:
        code = compile(block.text, block.place, "exec")
        if not block.needs:
            with torch.random.fork_rng():
                exec(code, names)


@pytest.mark.real_model
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_what_is_to_be_typed_can_be_typed(block, model, tokenizer, checkout, monkeypatch):
    def load(name: str = BUILT_IN_MODEL, **kwargs):
        assert name == BUILT_IN_MODEL, f"{block.place}: {name} comes from a hub, mark it with <!-- needs: hub -->"
        return model, tokenizer

    for user in ("demo", "evaluate", "models"):
        monkeypatch.setattr(importlib.import_module(f"evaluation.{user}"), "load_model", load)
    for words in commands(block.text):
        program = Path(words[0]).name
        if program == "make":
            # Whether there is such a target: what it does is tested elsewhere.
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif program.startswith("python") and words[1:3] == ["-m", "evaluation"]:
            with monkeypatch.context() as patches:
                evaluate(words[3:], bool(block.needs), patches)
        elif program.startswith("python") and words[1:3] == ["-m", "kvpress_merging"]:
            assert not words[3:]
            assert check_environment() == 0
        elif "pip" in words[:3]:
            check_extras(words)
        elif not block.needs and words[0] not in ("cd", ".") and words[1:3] != ["-m", "venv"]:
            pytest.fail(f"{block.place}: nobody knows how to check {shlex.join(words)!r}: teach this test, or mark it")


class Parsed(Exception):
    """The flags were read, and nothing more is to be done."""


def evaluate(argv: list[str], is_marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a sub-command with little work; where it is marked, or what it reads is not there, read its flags only."""
    command, *flags = argv
    assert command in COMMANDS or command == "--help", command
    is_there = command not in ("report", "compare") or all(Path(flag).exists() for flag in flags if flag[0] != "-")
    if command == "sweep" or not (is_marked or not is_there):
        flags += shlex.split(LITTLE_WORK.get(command, ""))
        if command == "run" and "fidelity" not in flags:
            flags.append("--max_new_tokens=2")
    else:
        module = importlib.import_module(f"evaluation.{command}")
        stop_after(monkeypatch, *((module, "parse_config") if hasattr(module, "parse_config") else PARSE_ARGS))
    status: object = 0
    try:
        main([command, *flags])
    except Parsed:
        pass
    except SystemExit as ended:
        status = ended.code
    assert not status, shlex.join(argv)


PARSE_ARGS = (Parser, "parse_args")


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let a function do its work, and then stop."""
    function = getattr(owner, name)

    def stop(*args, **kwargs):
        function(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(owner, name, stop)


def check_extras(words: list[str]) -> None:
    """What pip is asked for in brackets is among the extras of the package."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", pyproject, re.M | re.S).group(1)
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    for asked in re.findall(r"(?:kvpress-merging|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(asked.split(",")) <= extras, asked


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("yaml", "yml")], ids=lambda block: block.place
)
def test_a_sweep_can_be_read(block, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(block.text, encoding="utf-8")
    main(["sweep", str(file), f"--output_dir={tmp_path}", "--dry_run"])
    assert re.search(r"^\d+ cells, 0 done", capsys.readouterr().out, re.M)


def read_prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What a link can name after its #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES)
def test_links_into_the_checkout_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", read_prose(ROOT / file)):
        target = "".join(link)
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            # From where the page stands.
            page = (ROOT / file).parent / path if path else ROOT / file
            assert page.exists(), target
            assert not anchor or anchor in anchors(read_prose(page)), target


def test_the_mistakes_of_a_reader_would_be_found(monkeypatch):
    with pytest.raises(AssertionError, match="wrong_flag"), monkeypatch.context() as patches:
        evaluate(["run", "--wrong_flag=1"], True, patches)
    with pytest.raises(AssertionError):
        check_extras(["pip", "install", "kvpress-merging[nothing]"])
