"""The code in the docs runs, with a small random network where it asks for pretrained ones."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_there_are_blocks_to_run() -> None:
    assert len([block for page, _, block in BLOCKS if page == "models.md"]) == 3
