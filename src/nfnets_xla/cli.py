"""The command line: dispatch to commands and recipes, exit codes, one-line errors.

    nfnets-xla pretrain data.shards=DIR run_dir=runs/f0 ...
    nfnets-xla my_recipe --config-dir .        # a recipe of your own, extending ours
    nfnets-xla pretrain ... --cfg job          # show the run without starting it
    nfnets-xla shards index DIR
    nfnets-xla launch watch my_run.yaml        # on Cloud TPU

A mistake in the request gives one line on standard error and exit code 2. Each command imports what
it needs when it is called, so that help is fast and works without the extras.
"""

import os
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from errno import ENAMETOOLONG, ENOSPC
from importlib import import_module

from nfnets_xla.exits import (
    INTERRUPTED,
    START_AGAIN,
    TERMINATED,
    Failed,
    HostLost,
    Interrupted,
    Terminated,
)
from nfnets_xla.manual import no_such, recipes
from nfnets_xla.preempt import Preemption
from nfnets_xla.version import __version__

USAGE = """usage: nfnets-xla RECIPE [key=value ...]    run a recipe
       nfnets-xla RECIPE --help             describe it and all of its settings
       nfnets-xla RECIPE --cfg job          print the final settings and exit
       nfnets-xla COMMAND ...               run a command; see COMMAND --help
       nfnets-xla --version"""
COMMANDS = {  # each is a module of commands/
    "check": "check a run and estimate its cost without starting it",
    "shards": "pack, index, lint, stats, show, dedup, holdout, exclude",
    "checkpoint": "verify, show, export, card",
    "runs": "list the runs below a folder, with progress and results",
    "audit": "prove that every sample was shown exactly once",
    "two_trials": "sweep the learning rate by the paper's rule",
    "scaling": "plan, fit, figures: plan runs, and fit scaling laws",
    "launch": "run on Cloud TPU: example, watch, status, stop ...",
    "models": "list the models, or describe one",
    "predict": "classify images with a model",
    "signal": "plot a signal's statistics after each block",
    "convert": "convert weights, a file or a URL, to .safetensors",
}
HELP, VERSION = ("-h", "--help", "help"), ("-V", "--version")

WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
# {package that `pip install nfnets_xla` does not install: the extra in setup.cfg that does}.
EXTRAS = {
    **dict.fromkeys(("hydra", "omegaconf", "yaml", "lightning", "webdataset", "PIL"), "train"),
    **dict.fromkeys(("simplejpeg", "joblib", "fsspec", "rich", "tensorboard"), "train"),
    **dict.fromkeys(("gcsfs", "s3fs"), "remote"),
    **dict.fromkeys(("scipy", "matplotlib"), "scaling"),
    "faiss": "dedup",
    "torch_xla": "xla",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nfnets-xla`. Exit codes: 0; 2 for a mistake in the request or an address that
    does not answer; 75 if training was asked to stop, or lost a host or its storage, and the same
    command would resume it; 130 (Ctrl-C) or 143 (SIGTERM) if any other command was interrupted; 1
    if lint, verify or audit found faults, or if a launch, a run, a run of a sweep or a disk failed.
    """
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
        is_wrong = isinstance(error, WRONG_PATH) or error.errno == ENAMETOOLONG
        refuse(error, 2 if is_wrong else 1)
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
    except Terminated:
        refuse("interrupted", TERMINATED)
    except KeyboardInterrupt:
        refuse("interrupted", INTERRUPTED)


def refuse(error: Exception | str, code: int, *, at_once: bool = False) -> None:
    """Print the error and exit with `code`. `at_once` skips the libraries' exit handlers: those of
    torch_xla and NCCL wait for the devices."""
    print(f"nfnets-xla: {one_line(error)}", file=sys.stderr, flush=True)
    let_go_of_output()
    if at_once:
        os._exit(code)
    sys.exit(code)


def is_heard() -> bool:
    """Whether standard output has a reader; True if it is not a pipe."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return not output.poll(0)
    except (OSError, ValueError):  # a stream without a file descriptor
        return True


def let_go_of_output() -> None:
    """Discard output that cannot be written, or Python would report it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def obey(arguments: list[str], *, ours: bool) -> int | None:
    """Run the command; returns its exit code if not 0. If `ours`, set signal handlers."""
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
        if ours:
            signal.signal(signal.SIGTERM, terminate)
        return command(name)(rest)
    own_folder = any(word.startswith(("--config-dir", "-cd")) for word in rest)
    if name not in (*COMMANDS, *recipes()) and not own_folder:
        raise ValueError(no_such("recipe or command", name, [*COMMANDS, *recipes()]))
    preemption = Preemption()
    if ours and not {"-h", "--help"} & set(rest):
        preemption.start()
    if name == "two_trials":
        command(name)(rest, preemption)
    else:
        from nfnets_xla import compose

        compose.recipe(name, rest, preemption)
    return None


def command(name: str) -> Callable[..., int | None]:
    return import_module(f"nfnets_xla.commands.{name}").main


def terminate(_number: int, _frame: object) -> None:
    """SIGTERM raises, so that workers are ended and half-written folders are removed."""
    raise Terminated


def usage() -> str:
    width = shutil.get_terminal_size().columns
    lines = [USAGE]
    for title, entries in (
        ("commands", COMMANDS),
        ("recipes", recipes()),
    ):
        lines += ["", f"{title}:"]
        for name, purpose in entries.items():
            text = f"  {name:20} {purpose}"
            lines += textwrap.wrap(text, max(60, width - 1), subsequent_indent=" " * 23)
    return "\n".join(lines)


def one_line(error: Exception | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some, and give the same command again" if error.errno == ENOSPC else ""
        return f"{where}{error.strerror}{full}"
    return " ".join(str(error).split())
