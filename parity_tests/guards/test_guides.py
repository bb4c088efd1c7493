"""README and guides: every command in them is one its program takes, every link leads somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator

import pytest

import export.pt2onnx
import infer_tf.cli
import parity_tests.__main__
import train_torch.__main__
from parity_tests.guards.test_layout import ROOT
from train_torch.recipes import list_recipes

GUIDES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "train_torch").rglob("*.md")])

PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "crossfade": infer_tf.cli._parser,
    "python -m train_torch": train_torch.__main__._parser,
    "python export/pt2onnx.py": export.pt2onnx._parser,
    "python -m parity_tests": parity_tests.__main__.parser,
}

LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands in the code blocks of a page, split into words, programs of other people left out."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for one in line.removeprefix("$ ").split("&&"):
                program = next((name for name in PROGRAMS if one.strip().startswith(f"{name} ")), None)
                if program is not None and not one.strip().startswith("crossfade: "):
                    yield [program, *shlex.split(one.strip().removeprefix(program), comments=True)]


ALL = [(path, words) for path in GUIDES for words in commands(path.read_text(encoding="utf-8"))]


def test_the_guides_show_every_program():
    assert {words[0] for _, words in ALL} == set(PROGRAMS)
    assert len(ALL) > 50


@pytest.mark.parametrize(("path", "words"), ALL, ids=[f"{path.name}: {' '.join(words)}" for path, words in ALL])
def test_a_command_in_a_guide_is_taken(path, words, capsys):
    program, *arguments = words
    try:
        options = PROGRAMS[program]().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{path}: {' '.join(words)}: {capsys.readouterr().err}")
    for name in (getattr(options, "recipe", None) or "", *(getattr(options, "recipes", None) or ())):
        assert not name or name.endswith(".json") or name in list_recipes()


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
