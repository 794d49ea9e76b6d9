"""The label of a sample in a shard: one number, or several with weights.

    .cls, .txt   3        3 7        3:0.8 7:0.2          (commas for spaces, if you like)
    .json        {"label": 3}   {"label": [3, 7]}   {"label": [3, 7], "weight": [0.8, 0.2]}

JFT has 1.26 labels per image. Each label's share of a sample's loss is its weight / the sum of the
weights; labels without weights share equally.
"""

import json
import operator
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

KINDS = ("cls", "json", "txt")  # extensions, in order of precedence
MAX_LABEL = 2**31 - 1
MAX_LABELS = 64  # of one sample; a batch is padded to the most that any has
MAX_BYTES = 2**16
LEAST = 9.99e-10  # smallest weight: 1e-9 in float32 is slightly less than 1e-9

_ONE = re.compile(rb"(\d{1,10})(?::(\d{1,9}(?:\.\d{1,9})?))?")


def parse(kind: str, text: bytes) -> dict[int, float] | None:
    """Labels with their weights, or None if it is none of the forms above."""
    if len(text) > MAX_BYTES:
        return None
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        found = _from_json(text) if kind == "json" else _from_text(text)
        return checked(*found)
    return None


def checked(labels: Sequence[Any], weights: Sequence[Any]) -> dict[int, float]:
    """{label: weight}. Raises ValueError unless there is a positive weight for each label and no
    label appears twice; TypeError for anything but numbers."""
    if not 1 <= len(labels) <= MAX_LABELS or len(labels) != len(weights):
        raise ValueError(f"{len(labels)} labels and {len(weights)} weights")
    for label in labels:
        if isinstance(label, bool) or operator.index(label) not in range(MAX_LABEL + 1):
            raise ValueError(f"label {label!r}")
    for weight in weights:
        if isinstance(weight, bool) or not LEAST <= weight <= 1e9:
            raise ValueError(f"weight {weight!r}")
    found = {int(label): float(weight) for label, weight in zip(labels, weights, strict=True)}
    if len(found) < len(labels):
        raise ValueError("a label twice")
    return found


def to_text(labels: dict[int, float]) -> tuple[str, bytes]:
    """The shortest file content for these labels: (extension, text)."""
    if len(labels) == 1 and set(labels.values()) == {1.0}:
        return "cls", str(next(iter(labels))).encode()
    content: dict[str, list] = {"label": list(labels)}
    if set(labels.values()) != {1.0}:
        content["weight"] = list(labels.values())
    return "json", json.dumps(content).encode()


def _from_json(text: bytes) -> tuple[list, list]:
    content = json.loads(text)
    labels = content["label"]
    if type(labels) is int:
        labels = [labels]
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise ValueError("labels must be whole numbers")
    return labels, content.get("weight", [1.0] * len(labels))


def _from_text(text: bytes) -> tuple[list, list]:
    matches = [_ONE.fullmatch(part) for part in text.replace(b",", b" ").split()]
    if not all(matches):
        raise ValueError("not numbers")
    parts = [match.groups() for match in matches if match]
    return [int(label) for label, _ in parts], [float(weight or 1) for _, weight in parts]
