"""Errors of Hydra and OmegaConf in our words: one line with the value, the rule and the fix.

Their own messages are for authors of configurations: several lines, class names, and advice
(`+key=value`) that a typed run would refuse.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from nfnets_xla.config import setting_names

KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
LIST = "nfnets-xla RECIPE --help lists them"


@contextmanager
def in_our_words() -> Iterator[None]:
    """Raises ValueError for what Hydra and OmegaConf raise inside."""
    try:
        yield
    except OverrideParseException as error:
        raise ValueError(unreadable(error.override)) from error
    except HydraException as error:
        raise ValueError(uncomposed(error)) from error
    except OmegaConfBaseException as error:
        raise ValueError(untyped(error)) from error
    except YAMLError as error:
        raise ValueError(f"this is no YAML: {' '.join(str(error).split())}") from error


def unreadable(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is no setting: give key=value ({LIST})"
    if value.startswith("~"):
        return f"{word}: no shell expanded the ~; write {key}=$HOME{value[1:]}"
    return f"{word} cannot be read: quote the value twice, '{key}=\"{value}\"'"


def uncomposed(error: HydraException) -> str:
    """For an unknown key or config file, or several values where one is needed."""
    text = str(error)
    if found := re.match(r"Could not override '([^']*)'", text):
        return unknown(found[1], setting_names())
    if found := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        return f"{unreadable(found[1])}; several runs are nfnets-xla RECIPE ... --multirun"
    if found := re.search(r"Could not find '([^/']*)/([^']*)'", text):
        options = error.options if isinstance(error, MissingConfigException) else None
        among = options or re.findall(r"^\t(\w+)$", text, re.MULTILINE)
        return f"there is no {found[1]} {found[2]!r}; there are {', '.join(among)}"
    if found := re.match(r"Cannot find primary config '([^']*)'", text):
        return f"there is no recipe {found[1]!r}, neither in the folder of --config-dir nor here"
    return text.partition("Config search path")[0]


def untyped(error: OmegaConfBaseException) -> str:
    """For a key or a value that the dataclasses do not accept."""
    text, key = str(error).partition("\n")[0], error.full_key or "the file"
    if isinstance(error, InterpolationResolutionError):  # raised by one of our resolvers
        return text.partition("raised while resolving interpolation: ")[2] or f"{key}: {text}"
    if re.match(r"Key '.*' not in '\w+'", text) and is_dataclass(error.object_type):
        group = key.rpartition(".")[0]
        siblings = [f"{group}.{field.name}".lstrip(".") for field in fields(error.object_type)]
        known = setting_names()
        return unknown(key, known if siblings[0] in known else siblings)
    if found := re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        return f"{key} is {found[1]}; it must be {KINDS.get(found[2], found[2])}"
    if found := re.match(r"Value '(.*)' is not a valid (\w+)", text):
        return f"{key} is {found[1]}; it must be {KINDS.get(found[2], found[2])}"
    if text.startswith("Incompatible value 'None'"):
        return f"{key} is null; it must have a value: give {key}=VALUE"
    return f"{key}: {text}"


def unknown(key: str, known: Sequence[str]) -> str:
    """Suggests the same name in another group first, then names that are spelt similarly."""
    leaf = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(key, known, 3)
    meant = f"did you mean {' or '.join(near)}?" if near else LIST
    return f"there is no setting {key}; {meant}"
