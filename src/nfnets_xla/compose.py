"""Recipes to runs: Hydra and OmegaConf compose a name and overrides, and are used only here.

Recipes (recipes/) are Hydra's primary configs; the groups they pick from live in conf/. The result
is a typed, checked `Run`, or for a recipe that sweeps, one run after the other (sweep.py).
"""

import os
import sys
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin, get_type_hints

import hydra
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nfnets_xla.arguments import Parser
from nfnets_xla.config import Run, local_run_dir, setting_names
from nfnets_xla.exits import CellFailed, Failed, Interrupted
from nfnets_xla.manual import header, known, manual
from nfnets_xla.preempt import Preemption
from nfnets_xla.refusals import in_our_words

Settings = TypeVar("Settings")


class ConfOnPath(SearchPathPlugin):
    """Adds conf/ to Hydra's search path, and recipes/ for recipes elsewhere that extend ours. A
    recipe cannot set `hydra.searchpath` itself: Hydra refuses that once one recipe extends
    another."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("nfnets-xla", "pkg://nfnets_xla.conf")
        search_path.append("nfnets-xla", "pkg://nfnets_xla.recipes")


@in_our_words()
def recipe(name: str, arguments: list[str], preemption: Preemption) -> None:
    """Compose the recipe with Hydra and run it; with --help, say what it is."""
    given, settings = options(name, arguments)
    if given.config_dir is None:
        known(name)
    if given.help:
        plain = [word for word in settings if "=" in word]
        print(help_of(name, plain, given.config_dir))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to main() instead of a printed traceback
    tell_hydra()
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    quiet += [
        "hydra.sweep.dir='${local:${run_dir}}'",
        "hydra.sweep.subdir=.",
        "hydra/hydra_logging=none",
    ]
    # Hydra requires the settings to be consecutive, without options in between.
    sys.argv = ["nfnets-xla", "--config-name", name, *flags(given), *settings, *quiet]
    refused: list[Exception] = []
    here = os.getpid()

    def job(config: DictConfig) -> None:
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sweep_cell(config, name, arguments, preemption)
            else:
                execute(to_run(config), preemption)
        except (ValueError, Interrupted, Failed) as error:
            if os.getpid() != here:  # a launcher plugin's process: Hydra returns the error to ours
                raise
            refused.append(error)  # Hydra would print a traceback

    hydra.main(version_base="1.3", config_path="pkg://nfnets_xla.recipes", config_name=None)(job)()
    failed = [str(error) for error in refused if isinstance(error, CellFailed)]
    if failed:
        raise CellFailed(
            f"{len(failed)} of the sweep's runs failed: {'; '.join(failed)}; the same command "
            "tries them again"
        )
    if refused:
        raise refused[0]


def options(name: str, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """The Hydra options that a run supports, and all other words in their order.

    Raises ValueError for other options, for which Hydra would print its whole usage.
    """
    parser = Parser(prog=f"nfnets-xla {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    given, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            plain = f": settings have no dashes, {word.lstrip('-')}" if "=" in word else ""
            parser.error(f"there is no option {word}{plain}")
    return given, rest


def flags(given: Any) -> list[str]:
    """The options as command-line words again."""
    named = {f"--{name.replace('_', '-')}": value for name, value in vars(given).items()}
    return [name if value is True else f"{name}={value}" for name, value in named.items() if value]


def help_of(name: str, overrides: Sequence[str], folder: str | None) -> str:
    made = composed(name, overrides, folder)
    ours = OmegaConf.masked_copy(made, [str(key) for key in made if key != "hydra"])
    try:
        nested: Any = OmegaConf.to_container(ours, resolve=True)
    except ValueError:  # a value interpolates a setting that is still missing
        nested = OmegaConf.to_container(ours)
    values = {}
    for key in setting_names():
        group, _, leaf = key.rpartition(".")
        values[key] = (nested.get(group, {}) if group else nested).get(leaf, "???")
    return manual(name, header(name, folder), values, made.hydra.sweeper.params or {})


def tell_hydra() -> None:
    """Register the resolvers for recipes: `${local:...}`, `${model_of:...}`, `${variant:...}`."""
    from nfnets_xla.sweep import model_of

    Plugins.instance().register(ConfOnPath)
    OmegaConf.register_new_resolver("local", local_run_dir, replace=True)
    OmegaConf.register_new_resolver("model_of", model_of, replace=True)
    OmegaConf.register_new_resolver("variant", of_variant, replace=True)


def of_variant(model: str, setting: str) -> float:
    """An NFNet's setting from Table 1. In recipes: ${variant:${model.name},train_size}."""
    from nfnets_xla.models.peers import is_peer
    from nfnets_xla.models.registry import canonical_name
    from nfnets_xla.models.variants import VARIANTS

    if is_peer(model):
        raise ValueError(
            f"{model} has no {setting}: the recipe takes it from the NFNets' table; give a value"
        )
    return getattr(VARIANTS[canonical_name(model)], setting)


def sweep_cell(config: DictConfig, name: str, arguments: list[str], preemption: Preemption) -> None:
    """One job of Hydra's multirun. The settings that recipe or user sweep name its folder."""
    from nfnets_xla.sweep import Cell, going_on, refuse_shared, run_cell

    given = HydraConfig.get()
    params = given.sweeper.params or {}
    keys = [str(key) for key in params]
    asked, settings = options(name, arguments)
    words = [*(f"{key}={values}" for key, values in params.items()), *settings]
    overrides = OverridesParser.create().parse_overrides(words)
    for key, override in {each.key_or_group: each for each in overrides}.items():  # the last wins
        if override.is_sweep_override() and key != "run_dir":
            if override.value_type != ValueType.GLOB_CHOICE_SWEEP:  # names of config files
                refuse_shared(key, override.sweep_string_iterator())
            if key not in keys:
                keys.append(key)
    where = [] if asked.config_dir is None else [f"--config-dir={asked.config_dir}"]
    run = to_run(config)
    with going_on(run.run_dir):
        run_cell(Cell(run, keys, name, [*where, *given.overrides.task]), preemption)


@in_our_words()
def two_trials(
    name: str, overrides: list[str], preemption: Preemption, folder: str | None = None
) -> None:
    """Sweep the learning rate for each model and number of epochs, with one or several seeds. All
    failures are raised at the end. `folder` holds the user's own recipes."""
    from nfnets_xla.sweep import going_on
    from nfnets_xla.trials import next_pair, size

    params = composed(name, folder=folder).hydra.sweeper.params
    if not params:
        raise ValueError(f"{name} does not sweep: give lr_sweep, or a recipe of its kind")
    asked = trials_asked([f"{key}={value}" for key, value in params.items()], overrides)
    cells = []
    for model, epochs in product(asked.models, asked.epochs):
        cell = [*asked.rest, f"model.name={model}", f"optim.epochs={epochs}"]
        run = to_run(composed(name, [*cell, "seed=0"], folder))
        with going_on(run.run_dir):
            cells.append((size(run), run.optim.epochs, run, cell))
    where = [] if folder is None else [f"--config-dir={folder}"]
    failed = []
    for *_, run, cell in sorted(cells, key=lambda entry: entry[:2]):
        with going_on(run.run_dir):
            pair = next_pair(run)
        print(pair, flush=True)
        try:
            rates = f"optim.peak_lr={','.join(pair.rates)}"
            recipe(name, [*where, *cell, *asked.seeds, rates], preemption)
        except CellFailed as error:
            failed.append(str(error))
    if failed:
        raise CellFailed("; ".join(failed))


class TrialsAsked(NamedTuple):
    models: list[str]
    epochs: list[str]
    seeds: list[str]  # the word that sets the seeds, if there is one
    rest: list[str]  # the user's other overrides


def trials_asked(of_recipe: Sequence[str], overrides: Sequence[str]) -> TrialsAsked:
    """The recipe's sweep, overridden by the user's words. Raises ValueError for settings that
    two_trials chooses or cannot sweep, and if models or epochs are missing."""
    swept: dict[str, list[str]] = {}
    seeds: list[str] = []
    rest: list[str] = []
    for word in [*of_recipe, *overrides]:
        (override,) = OverridesParser.create().parse_overrides([word])
        key = override.get_key_element()
        if key in ("model.name", "optim.epochs"):
            several = override.is_sweep_override()
            one = [word.partition("=")[2]]
            swept[key] = list(override.sweep_string_iterator()) if several else one
        elif key == "optim.peak_lr" and word in overrides:
            raise ValueError(f"{word} is given; two_trials chooses the rates: leave it out")
        elif key == "seed":
            seeds = [word]
        elif word in overrides and override.is_sweep_override():
            raise ValueError(f"{word}: two_trials sweeps models, epochs and seeds; give one {key}")
        elif word in overrides:
            rest.append(word)
    for key in ("model.name", "optim.epochs"):
        if key not in swept:
            raise ValueError(f"{key} not set: give {key}=VALUE or several, with commas")
    return TrialsAsked(swept["model.name"], swept["optim.epochs"], seeds, rest)


@in_our_words()
def composed(name: str, overrides: Sequence[str] = (), folder: str | None = None) -> DictConfig:
    """A recipe, ours or in `folder`, composed but not run, including the "hydra" node. The values
    that a recipe sweeps are not set."""
    tell_hydra()
    if folder is None:
        known(name)
        where = initialize_config_module("nfnets_xla.recipes", version_base="1.3")
    else:
        where = initialize_config_dir(str(Path(folder).absolute()), version_base="1.3")
    with where:
        return hydra.compose(name, list(overrides), return_hydra_config=True)


def execute(run: Run, preemption: Preemption) -> None:
    preemption.resumes = run.job not in ("evaluate", "throughput")
    if run.job == "evaluate":
        from nfnets_xla.evaluate import evaluate

        evaluate(run)
        return
    from nfnets_xla.display import open_display

    with open_display() as display:
        if run.job == "throughput":
            from nfnets_xla.throughput import throughput

            throughput(run, display)
        elif run.job == "smoke":
            from nfnets_xla.smoke import smoke

            smoke(run, display, preemption)
        else:
            from nfnets_xla.train import train

            train(run, display, preemption)


@in_our_words()
def to_run(config: DictConfig) -> Run:
    """Merge into the dataclasses, which checks names and types, and check the values."""
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    typed = OmegaConf.merge(OmegaConf.structured(Run), ours)
    if typed.model.pretrained is not None and OmegaConf.is_missing(typed.model, "init_from"):
        typed.model.init_from = None  # the recipe requires weights, and these are given
    missing = sorted(OmegaConf.missing_keys(typed))
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: give {missing[0]}=VALUE")
    run = OmegaConf.to_object(typed)
    assert isinstance(run, Run)
    run.check()
    run.model.name = one_name(run.model.name)
    return run


def one_name(model: str) -> str:
    """The canonical name, used in records, for what people write (F3, dm_nfnet_f3)."""
    from nfnets_xla.models.card import SCHEME
    from nfnets_xla.models.registry import canonical_name

    return model if model.startswith(SCHEME) else canonical_name(model)


@in_our_words()
def read_settings(
    kind: type[Settings], file: Path, overrides: list[str], needed: Collection[str]
) -> Settings:
    """A dataclass read from a file and overrides, names and types checked as for a run. Settings
    that are missing and not `needed` are empty."""
    kinds = get_type_hints(kind).items()
    empty = {name: (get_origin(kind) or kind)() for name, kind in kinds if name not in needed}
    given = [OmegaConf.load(file), OmegaConf.from_dotlist(overrides)]  # ??? overrides nothing
    typed = OmegaConf.merge(OmegaConf.structured(kind), empty, *given)
    if missing := sorted(OmegaConf.missing_keys(typed)):
        raise ValueError(
            f"{', '.join(missing)} not set: fill in the file, or give {missing[0]}=VALUE"
        )
    settings = OmegaConf.to_object(typed)
    assert isinstance(settings, kind)
    return settings
