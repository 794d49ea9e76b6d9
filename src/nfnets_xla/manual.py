"""The list of recipes, and the text of `nfnets-xla RECIPE --help`.

The text is the recipe's header comment, then every setting with the recipe's value and the comment
on its field in config.py. Needs no Hydra.
"""

import difflib
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from nfnets_xla import config

FIELD = re.compile(r"^    (\w+): [^#]+?(?:  # (.*))?$", re.MULTILINE)
COLUMN = 36  # where the description of a setting begins

OPTIONS = """options:
  --cfg job           print the final settings and exit
  --multirun          run once for each value: optim.epochs=1,2
  --config-dir DIR    folder of your own recipes, which may extend these"""


def recipes() -> dict[str, str]:
    """Names of the shipped recipes with the first line of their headers."""
    found = sorted(file.name for file in files("nfnets_xla.recipes").iterdir())
    names = [name.removesuffix(".yaml") for name in found if name.endswith(".yaml")]
    return {name: header(name).partition("\n")[0] for name in names}


def known(name: str) -> None:
    """Raises ValueError if no shipped recipe has this name."""
    if name not in recipes():
        raise ValueError(no_such("recipe", name, list(recipes())))


def no_such(kind: str, name: str, names: Sequence[str]) -> str:
    """The refusal of a name that is none of `names`."""
    near = difflib.get_close_matches(name, names, 3, 0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    return f"there is no {kind} {name!r}; {meant} (your own recipe needs --config-dir DIR)"


def header(name: str, folder: str | None = None) -> str:
    """The comment at the top of a recipe's file."""
    where = files("nfnets_xla.recipes") if folder is None else Path(folder)
    lines = (where / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("#"), lines))


def manual(name: str, header: str, values: Mapping[str, Any], swept: Mapping[str, Any]) -> str:
    """The help text. `values` are the composed settings by dotted name; "???" is missing."""
    width = max(60, min(100, shutil.get_terminal_size().columns))
    lines = [f"usage: nfnets-xla {name} [key=value ...]", ""]
    for line in header.splitlines():
        broken = textwrap.wrap(line, width - 2, subsequent_indent="      ", break_long_words=False)
        lines.append((" \\\n" if line.startswith("  nfnets-xla") else "\n").join(broken))
    lines += ["", OPTIONS, ""]
    groups = ", ".join(f"{group}={'|'.join(parts(group))}" for group in config.GROUPS)
    lines += [*textwrap.wrap(f"choices of groups: {groups}", width, subsequent_indent="  "), ""]
    if swept:
        lines += ["one run for each of:", *(f"  {key}={value}" for key, value in swept.items())]
        lines.append("")
    lines.append("settings, with this recipe's values; ??? must be given:")
    said = comments()
    for key, value in values.items():
        setting = f"  {key}={written(value)}"
        lines += textwrap.wrap(
            f"{setting:{COLUMN - 2}}  {said[key]}".rstrip(),
            width,
            subsequent_indent=" " * COLUMN,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def parts(group: str) -> list[str]:
    found = (files("nfnets_xla.conf") / group).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))


def comments() -> dict[str, str]:
    """{dotted name of a setting: its comment in config.py, or ""}."""
    kinds = {f"{group}.": config.Run.__annotations__[group] for group in config.GROUPS}
    found = {
        prefix + field: re.sub(r"\bNone\b", "null", comment)  # as users write it
        for prefix, kind in {"": config.Run, **kinds}.items()
        for field, comment in FIELD.findall(inspect.getsource(kind))
    }
    return {name: found[name] for name in config.setting_names()}


def written(value: Any) -> str:
    """`value` as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
