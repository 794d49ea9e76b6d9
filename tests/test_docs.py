"""The code in the docs runs, with a small random network in place of pretrained ones, and the
command line accepts every command in them."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.arguments import Parser
from nfnets_xla.cli import COMMANDS, main
from nfnets_xla.compose import composed, options, to_run
from nfnets_xla.config import flat, setting_names
from nfnets_xla.manual import recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
BLOCKS = [
    (path.name, number, block)
    for path in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=lambda value: str(value)[:12])
def test_python_blocks_run(page: str, number: int, block: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    small = block.replace("nfnet_f0", "nfnet_mini_f0").replace(
        "pretrained=True", "pretrained=False"
    )
    done = subprocess.run(
        [sys.executable, "-c", small], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    """Every warning is an error: broken links and anchors, pages missing from the menu, unknown
    names."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nfnets_xla.optim.sgd_agc.SGD_AGC" in (tmp_path / "api" / "index.html").read_text()


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """The pages outside of the site; mkdocs checks those inside."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_picture_is_that_of_the_code() -> None:
    drawn = runpy.run_path(str(DOCS / "_draw_batch.py"))
    assert (DOCS / "batch.svg").read_text() == drawn["picture"](), "run docs/_draw_batch.py"


class Understood(BaseException):
    """The arguments were parsed; nothing needs to run."""


WHOLE = re.compile(r"^(?:    |#   )(?:torchrun \S+ -m nfnets_xla|nfnets-xla) +(.*)$", re.MULTILINE)
NAMED = re.compile(r"`nfnets-xla ([a-z]\w*)(?: ([a-z]+)\b)?")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each indented command, including "..." for omitted ones."""
    text = re.sub(r" *\\\n#? *", " ", page.read_text())
    for line in WHOLE.findall(text):
        line = re.split(r" {3,}| (?:does|prints|print) | > ", line.partition(" #")[0])[0]
        words = shlex.split(re.sub(r"\$\([^)]*\)", "A", line))
        if words[0] != "RECIPE":
            yield words


def understand(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises ValueError if the command line would refuse the command as written."""
    name, rest = words[0], [word for word in words[1:] if word != "..."]
    shortened = len(rest) + 1 < len(words)
    if name in recipes():
        options(name, rest)
        if {"--cfg", "--help"} & set(rest):
            return
        swept = composed(name).hydra.sweeper.params or {}
        given = [f"{key}={values}" for key, values in swept.items()] + rest
        # Of several values, as sweeps have, only the first.
        given = [re.sub(r"^([\w.]+=[^\[,]+),.*", r"\1", word) for word in given]
        try:
            to_run(composed(name, given))
        except ValueError as error:
            # "..." stands for settings that a page omits, and its RUN is not a real folder.
            forgiven = ["it must hold a record", *[" not set: give "] * shortened]
            if not any(part in str(error) for part in forgiven):
                raise
        return
    parse = Parser.parse_known_args

    def only_parse(self: Parser, *given: Any) -> NoReturn:
        _, left = parse(self, *given)
        if unknown := [word for word in left if word.startswith("-")]:
            raise ValueError(f"unknown: {unknown}")
        raise Understood

    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, only_parse)
        with pytest.raises(Understood):
            main([name, *rest])
    if name == "check":  # check also composes the recipe
        settings = [word for word in rest[1:] if "=" in word and not word.startswith("-")]
        understand([rest[0], "run_dir=null", *settings, *["..."] * shortened], monkeypatch)


@pytest.mark.parametrize(
    "page",
    [README, *sorted(DOCS.glob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(page):
        try:
            understand(words, monkeypatch)
        except SystemExit:
            pytest.fail(f"{page.name}: nfnets-xla {shlex.join(words)}")
        except ValueError as error:
            pytest.fail(f"{page.name}: nfnets-xla {shlex.join(words)}: {error}")
    for name, _ in NAMED.findall(page.read_text()):
        assert name in {*COMMANDS, *recipes(), "my_recipe"}, f"{page.name}: nfnets-xla {name}"


def test_a_command_that_is_wrong_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("pretrain data.shard=S", "pretrain optim.epochs=x", "pretrain --gpu"):
        with pytest.raises(ValueError, match=r"no setting|must be a number|no option"):
            understand(wrong.split(), monkeypatch)
    with pytest.raises(ValueError, match=r"optim\.epochs not set"):
        understand(["check", "pretrain", "data.shards=S", "--price", "3.2"], monkeypatch)
    for wrong in ("shards idx DIR", "runs", "scaling plan --hours 3", "convrt A B"):
        with pytest.raises(SystemExit):
            understand(wrong.split(), monkeypatch)
    assert sum(1 for page in (README, *DOCS.glob("*.md")) for _ in commands(page)) > 50


def test_the_readmes_first_lines_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"\n(    import torch, nfnets_xla\n(?:    .*\n|\n)*)", README.read_text())
    code = textwrap.dedent(block).replace("nfnet_f0", "nfnet_mini_f0")
    code = code.replace("pretrained=True", "pretrained=False").replace("f7_plus", "mini_f0")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_blocks_to_run() -> None:
    assert len([block for page, _, block in BLOCKS if page == "models.md"]) == 3


def test_a_setting_that_no_recipe_turns_is_on_a_page() -> None:
    """That is what an option is for (CONTRIBUTING.md)."""
    every: dict[str, set[str]] = {name: set() for name in setting_names()}
    for file in (ROOT / "tests" / "golden" / "recipes").glob("*.json"):
        for name, value in flat(json.loads(file.read_text())).items():
            every[name].add(repr(value))
    pages = "".join(page.read_text() for page in (README, *DOCS.glob("*.md")))
    same = [name for name, values in every.items() if len(values) == 1]
    assert len(same) > 15
    assert [name for name in same if not re.search(rf"\b{re.escape(name)}\b", pages)] == []
