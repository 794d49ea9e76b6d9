"""Finds the checkpoint or weights that a user names: by a run's folder, a folder of checkpoints, a
checkpoint, or a file of weights.

A run's record says where its checkpoints are: it has the configuration of each start.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nfnets_xla.checkpoint import MANIFEST, Checkpoint, is_one, latest, load, steps
from nfnets_xla.config import differences, flat, identity_of
from nfnets_xla.data.storage import address
from nfnets_xla.models.registry import Network, count_classes, create_network
from nfnets_xla.models.timm_names import Sizes
from nfnets_xla.models.weights import load_checkpoint, load_into
from nfnets_xla.record import CHECKPOINTS, read_record

_log = logging.getLogger(__name__)


def find(given: str | Path) -> Checkpoint | None:
    """The checkpoint at `given`, or the newest intact one in a folder of checkpoints or a run's
    folder; warns about damaged ones that it passes over."""
    if address(given):
        return load(given) if is_one(given) else _newest(given)
    path = Path(given)
    if (path / MANIFEST).is_file():
        return load(path)
    root = checkpoints_of(path)
    if root in (str(path), str(path / CHECKPOINTS)):
        found = _newest(root)
        _refuse_older(path, found)
        return found
    if not steps(root):
        raise ValueError(
            f"{path} holds a run that keeps its checkpoints in {root}, and there are none: give "
            "the folder that has them"
        )
    found = _newest(root, path)
    if found is not None and (changed := _differences(found, config_of(path) or {})):
        raise ValueError(
            f"{path} holds a run that kept its checkpoints in {root}, and {found} is of another "
            f"({'; '.join(changed)}): give the folder that has its own"
        )
    return found


def checkpoints_of(run_dir: Path) -> str:
    """The first folder that holds checkpoints: where the newest start of the run keeps them, where
    earlier starts did (the run may have moved), `run_dir/checkpoints`, or `run_dir` itself. If none
    has any, where the newest start should have them."""
    kept = [_checkpoint_dir(config) for config in configs_of(run_dir)]
    inside = str(run_dir / CHECKPOINTS)
    for root in (*(where or inside for where in kept), inside, run_dir):
        if steps(root):
            return str(root)
    return str(next(filter(None, kept), run_dir))


def _refuse_older(run_dir: Path, found: Checkpoint | None) -> None:
    """ValueError if the run saved newer ones elsewhere, which are gone (a disk not mounted?)."""
    elsewhere = checkpoint_dir_of(run_dir)
    if elsewhere is None or found is None:
        return
    saved = 0
    with suppress(ValueError):  # a damaged record must not make the weights unusable
        rows = read_record(run_dir).of_kind("checkpoint")
        saved = max((row["step"] for row in rows), default=0)
    if saved > found.step:
        raise ValueError(
            f"{run_dir} holds a run that has saved step {saved} in {elsewhere}, where there is "
            f"none now, and {found} is older: mount that, or give the checkpoint itself"
        )


def checkpoint_dir_of(run_dir: Path) -> str | None:
    """Where the newest start of a run keeps its checkpoints, if not in the run's folder."""
    return _checkpoint_dir(config_of(run_dir) or {})


def _checkpoint_dir(config: dict[str, Any]) -> str | None:
    return (config.get("trainer") or {}).get("checkpoint_dir")


def config_of(run_dir: Path) -> dict[str, Any] | None:
    """The configuration of the newest start with a readable header; None without a record."""
    return next(configs_of(run_dir), None)


def configs_of(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The configuration of each start, newest first; reads only the headers."""
    files = run_dir.glob("run-*.jsonl")
    for file in sorted(files, key=lambda file: (len(file.name), file.name), reverse=True):
        with suppress(ValueError), file.open(encoding="utf-8") as lines:
            if config := json.loads(lines.readline()).get("config"):
                yield config


def _newest(root: str | Path, run: Path | None = None) -> Checkpoint | None:
    found, skipped = latest(root, run)
    for line in skipped:
        _log.warning("warning: %s", line)
    return found


def _differences(found: Checkpoint, config: dict[str, Any]) -> list[str]:
    """Compares only keys in both identities: another release may have other keys."""
    theirs, ours = flat(found.state.get("identity", {})), flat(identity_of(config))
    common = theirs.keys() & ours.keys()
    return differences({key: ours[key] for key in common}, {key: theirs[key] for key in common})


@dataclass(frozen=True)
class Weights:
    """Weights in a file, or one form of a checkpoint; read on demand."""

    source: str  # what they came from
    file: Path
    of: Checkpoint | None  # kept alive: its files may be temporary copies

    @cached_property
    def sha256(self) -> str:
        if self.of is not None:
            return json.loads((self.of.folder / MANIFEST).read_bytes())[self.file.name]["sha256"]
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def sizes(self) -> Sizes | None:
        """The image sizes of the run; None for a file, which does not say."""
        return None if self.of is None else Sizes.of_run(self.of.state["identity"]["data"])

    def peer_options(self, name: str, eval_image_size: int | None = None) -> dict[str, Any]:
        """The image sizes, as options of create_network, for a peer with these weights: a ViT is
        built for one size, which its weights do not show. ValueError for a file."""
        if (sizes := self.sizes) is None:
            raise ValueError(
                f"{self.source} does not say for which size of images {name} was made: give "
                "--weights a run's folder or a checkpoint"
            )
        return {"image_size": sizes.train, "eval_image_size": eval_image_size or sizes.test}

    @property
    def loss(self) -> str:
        """The loss of training, "softmax" or "sigmoid"; for a file "softmax" is assumed."""
        return "softmax" if self.of is None else self.of.state["identity"]["optim"]["loss"]

    def tensors(self) -> dict[str, Tensor]:
        return load_checkpoint(self.file) if self.of is None else load_file(self.file)

    def network(self, name: str, *, headless: bool = False, **options: Any) -> Network:
        """The model with these weights and their number of classes, or `headless`; `options` are
        create_network's. ValueError for weights of another model."""
        state = self.tensors()
        classes = 0 if headless else count_classes(name, state)
        net = create_network(name, num_classes=classes, **options)
        load_into(net, state, source=self.source, allow_new_head=headless)
        return net


def find_weights(given: str, which: str) -> Weights:
    """A file of weights, or one form of the checkpoint at `given`: `which` is "raw" or "ema".

    Raises ValueError if `given` is neither, or the checkpoint lacks that form.
    """
    if Path(given).is_file():
        return Weights(given, Path(given), None)
    found = find(given)
    if found is None:
        raise ValueError(
            f"{given!r} holds no weights: give a weights file, the folder of a checkpoint, or "
            "the folder of a run that has one"
        )
    form = "model" if which == "raw" else "ema"
    if form not in found.forms:
        raise ValueError(f"{found} holds no {which} weights: use model.init_weights=raw")
    return Weights(str(found), found.folder / f"{form}.safetensors", found)
