"""Installed packages: under permitted licences, pinned by hash, and not imported needlessly."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-tpu.lock", "requirements-gates.lock")
PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([^ ]+) ", re.MULTILINE)

# As packages name them: SPDX, classifiers, or their own words. None obliges those who import the
# package: MPL-2.0 binds only those who change its own files.
ALLOWED = {
    *("Apache-2.0", "Apache 2.0", "Apache Software License", "MIT", "MIT License", "MIT-0"),
    *("MIT-CMU", "BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib"),
    *("2-clause BSD License", "3-Clause BSD License", "CC0-1.0", "PSF-2.0", "DFSG approved"),
    *("Python Software Foundation License", "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"),
}
# CUDA's libraries, which torch's wheels for Linux bring; NVIDIA's terms allow their use.
PROPRIETARY = "nvidia-"

# Modules that a program must not load if it only needs a network, or only a plan.
HEAVY = ("torch_xla", "lightning", "hydra", "omegaconf", "webdataset", "timm", "ray", "matplotlib")


def pins(lock: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / lock).read_text(encoding="utf-8")))


def licences(name: str) -> list[str]:
    about = importlib.metadata.metadata(name)
    classifiers = [
        line.split(" :: ")[-1]
        for line in about.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    expression, words = (
        (about.get_all(key) or [""])[0] for key in ("License-Expression", "License")
    )
    said = expression or " AND ".join(classifiers) or words
    return re.split(r" AND | OR ", said.strip().partition("\n")[0])


def test_every_locked_package_has_a_licence_that_we_allow() -> None:
    others = {
        name: found
        for name in pins("requirements.lock")
        if not name.startswith(PROPRIETARY) and not set(found := licences(name)) <= ALLOWED
    }
    assert not others


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash(lock: str) -> None:
    blocks = re.split(r"^(?=\S)", (ROOT / lock).read_text(encoding="utf-8"), flags=re.MULTILINE)
    pinned = [block for block in blocks if "==" in block.partition("\n")[0]]
    assert len(pinned) == len(pins(lock)) > 50
    assert all("--hash=sha256:" in block for block in pinned)


@pytest.mark.parametrize("lock", LOCKS)
def test_the_locks_keep_to_setup_cfg(lock: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    pinned = pins(lock)
    told = [config["options"]["install_requires"], *extras.values()]
    for line in "\n".join(told).split("\n"):
        wanted = Requirement(line) if line and not line.startswith("nfnets_xla") else None
        name = wanted.name.lower().replace("_", "-") if wanted else ""
        if wanted and name in pinned:
            assert wanted.specifier.contains(pinned[name]), (line, pinned[name])
    if lock == "requirements.lock":
        direct = {
            Requirement(line).name.lower().replace("_", "-")
            for extra in ("dev", "xla", "train", "remote", "dedup", "scaling", "docs")
            for line in extras[extra].split("\n")
            if line and not line.startswith("nfnets_xla")
        }
        assert direct <= pinned.keys()


def test_an_import_loads_nothing_heavy() -> None:
    ours = "nfnets_xla, nfnets_xla.optim, nfnets_xla.scaling.law, nfnets_xla.data.order"
    program = f"import sys, {ours}; print(*[m for m in {HEAVY} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []
