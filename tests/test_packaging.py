"""The wheel is complete: installed elsewhere, away from the checkout, it runs a recipe."""

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.runs import PLAIN_CPU, SMALL

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join(file.parent.relative_to(ROOT / "src").parts)
        for file in (ROOT / "src").rglob("__init__.py")
    }
    assert listed == found | {"nfnets_xla.conf", "nfnets_xla.recipes"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    files = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "src", "conf", "recipes"]
    call("cp", "-r", *(ROOT / name for name in files), folder, cwd=folder)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "recipes"):
        for file in (ROOT / folder).rglob("*.yaml"):
            assert f"nfnets_xla/{file.relative_to(ROOT)}" in names
    for file in (ROOT / "recipes" / "launch").iterdir():
        assert f"nfnets_xla/recipes/launch/{file.name}" in names
    assert "nfnets_xla/py.typed" in names


def test_a_recipe_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path, shards: Path) -> None:
    """In its own environment, which borrows only the heavy packages."""
    venv = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    site = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    python = venv / "bin" / "python"
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    install = ["uv", "pip", "install", "-q", "--no-deps", "--python", python, wheel]
    call(*install, cwd=tmp_path, PATH=tools)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files stay out
    where = call(python, "-c", "import nfnets_xla; print(nfnets_xla.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(venv)
    command = venv / "bin" / "nfnets-xla"
    assert "pretrain_demo" in call(command, "--help", cwd=tmp_path)
    options = [*SMALL, *PLAIN_CPU, "optim.epochs=0.2", "optim.warmup_steps=1"]
    options += [f"data.shards={shards / 'train'}", "run_dir=run"]
    call(command, "pretrain_demo", *options, cwd=tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()
