"""The command line: which command was meant, and what is said when it ends.

    nfnets-xla pretrain data.shards=DIR run_dir=runs/f0 ...
    nfnets-xla my_recipe --config-dir .        # a person's own recipe, extending ours
    nfnets-xla pretrain ... --cfg job          # show the run without starting it
    nfnets-xla shards index DIR
    nfnets-xla launch watch my_run.yaml        # on Cloud TPU

A mistake in what was asked for is one line on standard error and exit code 2. Each command imports
what it needs when it is called: help is there at once, and without the extras.
"""

import difflib
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from errno import ENOSPC
from pathlib import Path
from typing import Any

from nfnets_xla.exits import INTERRUPTED, START_AGAIN, Failed, HostLost, Interrupted
from nfnets_xla.manual import recipes
from nfnets_xla.preempt import Preemption
from nfnets_xla.shards_cli import Parser
from nfnets_xla.shards_cli import shards as other_shards
from nfnets_xla.version import __version__

USAGE = """usage: nfnets-xla RECIPE [key=value ...]    run a recipe
       nfnets-xla RECIPE --help             what it is, and all that can be set
       nfnets-xla RECIPE --cfg job          print what would run; start nothing
       nfnets-xla COMMAND ...               one of these; --help says more
       nfnets-xla --version"""
HELP, VERSION = ("-h", "--help", "help"), ("-V", "--version")

WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# The extra of setup.cfg that brings each package which `pip install nfnets_xla` does not.
EXTRAS = {
    **dict.fromkeys(("hydra", "omegaconf", "yaml", "lightning", "webdataset", "PIL"), "train"),
    **dict.fromkeys(("simplejpeg", "joblib", "fsspec", "rich", "tensorboard"), "train"),
    **dict.fromkeys(("gcsfs", "s3fs"), "remote"),
    **dict.fromkeys(("scipy", "matplotlib"), "scaling"),
    "faiss": "dedup",
    "torch_xla": "xla",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nfnets-xla`. Exits with 0; 2 for a mistake in the request, or an address that
    does not answer; 75 for a training that was asked to stop, or lost a host or its storage, and
    goes on when the same command is given again; 130 (Ctrl-C) or 143 (SIGTERM) for any other
    command that was interrupted; 1: lint, verify or audit found faults, a launch, a run or one of a
    sweep failed, or a disk."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = obey(arguments, ours=argv is None)
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except BrokenPipeError as error:
        if is_heard():
            refuse(error, 1)
        let_go_of_output()  # `nfnets-xla models | head`: the reader has seen enough
    except OSError as error:
        refuse(error, 2 if isinstance(error, WRONG_PATH) else 1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        needed = f"pip install 'nfnets_xla[{EXTRAS[package]}]'"
        refuse(f"{arguments[0]} needs {package}, which is not installed: {needed}", 2)
    except ValueError as error:
        refuse(error, 2)
    except Failed as error:
        refuse(error, 1)
    except HostLost as error:
        refuse(error, START_AGAIN, at_once=True)
    except Interrupted as error:
        refuse(error, START_AGAIN)
    except KeyboardInterrupt:
        refuse("interrupted", INTERRUPTED)


def refuse(error: Exception | str, code: int, *, at_once: bool = False) -> None:
    """`at_once` does without what libraries do at the end of a process: torch_xla and NCCL wait
    there for the devices."""
    print(f"nfnets-xla: {one_line(error)}", file=sys.stderr, flush=True)
    let_go_of_output()
    if at_once:
        os._exit(code)
    sys.exit(code)


def is_heard() -> bool:
    """Whether standard output has a reader; what is no pipe always has."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return not output.poll(0)
    except (OSError, ValueError):  # of a stream without a file
        return True


def let_go_of_output() -> None:
    """What cannot be written is forgotten, or Python would complain of it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def obey(arguments: list[str], *, ours: bool) -> int | None:
    """Returns the exit code, if it is not 0. The process may be `ours`, signals and all."""
    if arguments[:1] and arguments[0] in HELP and arguments[1:]:  # nfnets-xla help pretrain
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP:
        print(usage())
        return None
    name, rest = arguments[0], arguments[1:]
    if name in VERSION:
        print(f"nfnets_xla {__version__}")
        return None
    if name in COMMANDS and name != "two_trials":
        return COMMANDS[name][0](rest)
    own_folder = any(word.startswith(("--config-dir", "-cd")) for word in rest)
    if name not in (*COMMANDS, *recipes()) and not own_folder:
        raise ValueError(no_such(name))
    preemption = Preemption()
    if ours and not {"-h", "--help"} & set(rest):
        preemption.start()
    if name == "two_trials":
        two_trials(rest, preemption)
    else:
        from nfnets_xla import compose

        compose.recipe(name, rest, preemption)
    return None


def no_such(name: str) -> str:
    known = [*COMMANDS, *recipes()]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"there is no recipe and no command {name!r}; {meant} (your own needs --config-dir DIR)"


def usage() -> str:
    width = shutil.get_terminal_size().columns
    lines = [USAGE]
    for title, entries in (
        ("commands", {name: purpose for name, (_, purpose) in COMMANDS.items()}),
        ("recipes", recipes()),
    ):
        lines += ["", f"{title}:"]
        for name, purpose in entries.items():
            text = f"  {name:20} {purpose}"
            lines += textwrap.wrap(text, max(60, width - 1), subsequent_indent=" " * 23)
    return "\n".join(lines)


def shards(arguments: list[str]) -> int | None:
    if arguments[:1] == ["show"]:
        return show_shards(arguments[1:])
    if arguments[:1] == ["dedup"]:
        from nfnets_xla.dedup_cli import dedup

        return dedup(arguments[1:])
    return other_shards(arguments)


def show_shards(arguments: list[str]) -> None:
    from nfnets_xla.show import parse

    request = parse(arguments)
    from nfnets_xla.compose import composed, to_run
    from nfnets_xla.show import show

    # What the sheet does not depend on, and a recipe may leave to be set.
    needless = ["run_dir=null", "model.init_from=null", "data.eval_shards=null", "optim.epochs=1"]
    overrides = [f'data.shards="{request.folder}"', *needless, *request.overrides]
    run = to_run(composed(request.recipe, overrides, request.config_dir))
    show(run, request.out, request.rows, request.step)


def check(arguments: list[str]) -> None:
    from nfnets_xla import forecast

    Terms = forecast.Terms
    parser = Parser(prog="nfnets-xla check", description=forecast.__doc__)
    parser.add_argument("recipe", help="a name of `nfnets-xla --help`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--hardware", default=Terms.hardware, help="v4, v5e, H100 ...")
    parser.add_argument("--mfu", type=float, default=Terms.mfu, help="share of the peak reached")
    parser.add_argument(
        "--chips",
        type=int,
        default=Terms.chips,
        help="for the wall clock; their devices must divide the batches and have the memory",
    )
    parser.add_argument("--price", type=float, help="of a chip-hour, in any currency")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of recipes of your own")
    given = parser.parse_intermixed_args(arguments)
    terms = Terms(given.hardware, given.mfu, given.chips, given.price)
    from nfnets_xla.compose import composed, to_run

    overrides = ["run_dir=null", *given.overrides]
    run = to_run(composed(given.recipe, overrides, given.config_dir))
    for what, how_much in forecast.forecast(run, terms):
        print(f"{what:12} {how_much}")


def checkpoint(arguments: list[str]) -> int:
    from nfnets_xla.checkpoint_cli import checkpoints

    return checkpoints(arguments)


def runs(arguments: list[str]) -> None:
    from nfnets_xla import overview

    overview.runs(arguments)


def audit(arguments: list[str]) -> int:
    """Prove from the ledger of a run that every sample was shown exactly once, over all starts.

    Exit code 1 if one was missed or repeated. What a restart computed again is told apart.
    """
    from nfnets_xla import ledger

    parser = Parser(prog="nfnets-xla audit", description=audit.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with trainer.ledger=true")
    found = ledger.audit(parser.parse_args(arguments).run)
    print("\n".join(found.report()))
    return 1 if found.faults else 0


def scaling(arguments: list[str]) -> None:
    from nfnets_xla import scaling_cli

    scaling_cli.scaling(arguments)


def two_trials(arguments: list[str], preemption: Preemption) -> None:
    from nfnets_xla import compose, trials

    parser = Parser(prog="nfnets-xla two_trials", description=trials.__doc__)
    parser.add_argument("recipe", help="one that sweeps: lr_sweep, scaling_sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of recipes of your own")
    given = parser.parse_intermixed_args(arguments)
    compose.two_trials(given.recipe, given.overrides, preemption, given.config_dir)


def launch(arguments: list[str]) -> None:
    from nfnets_xla.launch import launch as launched

    def read(file: Path, overrides: list[str], needed: Collection[str]) -> Any:
        from nfnets_xla.compose import read_launch

        return read_launch(file, overrides, needed)

    launched(arguments, read)


def models(arguments: list[str]) -> None:
    """List models with parameters and cost, or say all about those that are named in full."""
    parser = Parser(prog="nfnets-xla models", description=models.__doc__)
    parser.add_argument("pattern", nargs="*", help="a name, or part of several: nfnet_f7*")
    patterns = parser.parse_args(arguments).pattern
    from nfnets_xla.models.registry import card, full_card, list_models

    for pattern in patterns or ["*"]:
        names = list_models(pattern)
        if not names:
            near = list_models(f"*{pattern.strip('*')}*")
            meant = f"there are {', '.join(near)}" if near else "see nfnets-xla models"
            raise ValueError(f"no model matches {pattern!r}: {meant}")
        for name in names:
            print(full_card(name) if names == [pattern] else card(name))


def predict(arguments: list[str]) -> None:
    from nfnets_xla.predict import predict as predicted

    predicted(arguments)


def signal(arguments: list[str]) -> None:
    from nfnets_xla.propagation import signal as plotted

    plotted(arguments)


def convert(arguments: list[str]) -> None:
    """Rewrite weights of an NFNet as one .safetensors file, in our names, timm's or DeepMind's.

    The form of SOURCE is told by its content; nothing in it is run. Every name, shape and value is
    checked against the model before anything is written.
    """
    from nfnets_xla.models.convert import TARGETS, convert_weights

    parser = Parser(prog="nfnets-xla convert", description=convert.__doc__)
    parser.add_argument("source", help="file of weights of any form, or its http(s) address")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", required=True, help="a name of `nfnets-xla models`")
    parser.add_argument("--to", choices=TARGETS, default="ours", help="whose names to write")
    parser.add_argument(
        "--plus-bottleneck",
        choices=("code", "paper"),
        default="code",
        help="of the + models: as released, or as printed",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    given = parser.parse_args(arguments)
    print(
        convert_weights(
            given.source,
            given.target,
            model=given.model,
            to=given.to,
            plus_bottleneck=given.plus_bottleneck,
            force=given.force,
        )
    )


COMMANDS: dict[str, tuple[Callable[..., int | None], str]] = {
    "check": (check, "what a recipe would do and cost; starts nothing"),
    "shards": (shards, "pack, index, lint, stats, show, dedup, holdout, exclude"),
    "checkpoint": (checkpoint, "verify, show, export, card"),
    "runs": (runs, "how far the runs below a folder are, and what came out"),
    "audit": (audit, "prove that every sample was shown exactly once"),
    "two_trials": (two_trials, "sweep the learning rate by the paper's rule"),
    "scaling": (scaling, "plan, fit, figures: what to train, and what runs follow"),
    "launch": (launch, "run on Cloud TPU: example, watch, status, stop ..."),
    "models": (models, "list the models, or all about one"),
    "predict": (predict, "what a model says of pictures"),
    "signal": (signal, "how a signal goes through a network, block by block"),
    "convert": (convert, "rewrite weights: a file of any form, or an address"),
}


def one_line(error: Exception | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some, and give the same command again" if error.errno == ENOSPC else ""
        return f"{where}{error.strerror}{full}"
    return " ".join(str(error).split())
