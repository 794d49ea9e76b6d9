"""The code in the docs runs, with a small random network where it asks for pretrained ones."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.cli import recipes, usage

DOCS = Path(__file__).parents[1] / "docs"
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
    """Every warning is an error: broken links and anchors, pages in no menu, names without code."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nfnets_xla.optim.sgd_agc.SGD_AGC" in (tmp_path / "api" / "index.html").read_text()


def test_the_picture_is_that_of_the_code() -> None:
    drawn = runpy.run_path(str(DOCS / "_draw_batch.py"))
    assert (DOCS / "batch.svg").read_text() == drawn["picture"](), "run docs/_draw_batch.py"


def test_commands_in_the_docs_exist() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    known = {*recipes(), *re.findall(r"nfnets-xla (\w+)", usage())}
    named = {
        (page.name, command)
        for page in pages
        for command in re.findall(r"^    nfnets-xla ([a-z]\w*)", page.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert [(page, command) for page, command in named if command not in known] == []


def test_there_are_blocks_to_run() -> None:
    assert len([block for page, _, block in BLOCKS if page == "models.md"]) == 3
