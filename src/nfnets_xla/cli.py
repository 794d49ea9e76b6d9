"""The command line: which command was meant, and what is said when it ends.

    nfnets-xla pretrain data.shards=DIR run_dir=runs/f0 ...
    nfnets-xla my_recipe --config-dir .        # a person's own recipe, extending ours
    nfnets-xla pretrain ... --cfg job          # show the run without starting it
    nfnets-xla shards index DIR
    nfnets-xla launch watch my_run.yaml        # on Cloud TPU

A mistake in what was asked for is one line on standard error and exit code 2.
"""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from nfnets_xla import compose
from nfnets_xla.compose import composed, recipes, to_run
from nfnets_xla.exits import START_AGAIN, Failed, Interrupted
from nfnets_xla.launch import launch
from nfnets_xla.preempt import Preemption
from nfnets_xla.shards_cli import Parser, progress, shards

USAGE = """usage: nfnets-xla RECIPE [key=value ...]     run a recipe
       nfnets-xla RECIPE --cfg job           show what it would run
       nfnets-xla check RECIPE [key=value ...] what it would do and cost (--help); starts nothing
       nfnets-xla shards COMMAND ...         pack, index, lint, stats, holdout, exclude (--help)
       nfnets-xla shards show DIR            draw the views that a recipe makes of them
       nfnets-xla shards dedup DIR ...       list near-duplicates, for data.exclude (--help)
       nfnets-xla checkpoint COMMAND WHERE   verify, show, export, card (--help)
       nfnets-xla runs DIR                   how far runs are, and what came out (--help)
       nfnets-xla audit RUN                  prove that every sample was shown exactly once
       nfnets-xla two_trials RECIPE ...      sweep the learning rate by the paper's rule (--help)
       nfnets-xla scaling COMMAND ...        plan, fit, figures (--help)
       nfnets-xla launch COMMAND FILE        run on Cloud TPU: create, watch, resume ... (--help)
       nfnets-xla models [PATTERN | NAME]    list the models, or show all about one
       nfnets-xla predict MODEL IMAGE ...    what a model says of pictures (--help)
       nfnets-xla signal NAME [--out PNG]    plot mean square and variance after every block
       nfnets-xla convert SRC DST --model NAME [--to ours|timm|haiku] [--force]
                                             rewrite weights: a file of any form, or an address

recipes:"""


WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nfnets-xla`. Exits with 0; 2 for a mistake in the request; 75 for a training
    that was asked to stop or lost a host, and goes on when the same command is given again; 1:
    lint, verify or audit found faults, a launch or a run of a sweep failed, or a disk or server."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    preemption = Preemption()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage())
        elif arguments[:2] == ["shards", "show"]:
            show_shards(arguments[2:])
        elif arguments[:2] == ["shards", "dedup"]:
            dedup(arguments[2:])
        elif arguments[0] == "check":
            check(arguments[1:])
        elif arguments[0] == "shards":
            if code := shards(arguments[1:]):
                sys.exit(code)
        elif arguments[0] == "checkpoint":
            if code := checkpoint(arguments[1:]):
                sys.exit(code)
        elif arguments[0] == "runs":
            runs(arguments[1:])
        elif arguments[0] == "audit":
            audit(arguments[1:])
        elif arguments[0] == "scaling":
            scaling(arguments[1:])
        elif arguments[0] == "launch":
            if code := launch(arguments[1:], compose.read_launch):
                sys.exit(code)
        elif arguments[0] == "models":
            models(arguments[1:])
        elif arguments[0] == "predict":
            predict(arguments[1:])
        elif arguments[0] == "signal":
            signal(arguments[1:])
        elif arguments[0] == "convert":
            convert(arguments[1:])
        else:
            if argv is None:  # the process is ours
                preemption.start()
            if arguments[0] == "two_trials":
                two_trials(arguments[1:], preemption)
            else:
                compose.recipe(arguments[0], arguments[1:], preemption)
        sys.stdout.flush()
    except BrokenPipeError:  # `nfnets-xla models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"nfnets-xla: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WRONG_PATH) else 1)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"nfnets-xla: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"nfnets-xla: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(f"nfnets-xla: {one_line(error)}", file=sys.stderr)
        sys.exit(START_AGAIN)


def usage() -> str:
    lines = [f"  {name:24} {purpose}" for name, purpose in recipes().items()]
    return "\n".join([USAGE, *lines])


def show_shards(arguments: list[str]) -> None:
    from nfnets_xla.show import parse, show

    request = parse(arguments)
    # What the sheet does not depend on, and a recipe may leave to be set.
    needless = ["run_dir=null", "model.init_from=null", "data.eval_shards=null", "optim.epochs=1"]
    overrides = [f"data.shards={request.folder}", *needless, *request.overrides]
    run = to_run(composed(request.recipe, overrides))
    show(run, request.out, request.rows, request.step)


def dedup(arguments: list[str]) -> None:
    from nfnets_xla.dedup_cli import dedup as deduplicated

    deduplicated(arguments)


def check(arguments: list[str]) -> None:
    from nfnets_xla.forecast import Terms, forecast

    parser = Parser(prog="nfnets-xla check", description=check_help())
    parser.add_argument("recipe", help="a name of `nfnets-xla --help`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hardware", default=Terms.hardware, help="v4 if not given; v3, H100 ...")
    parser.add_argument("--mfu", type=float, default=Terms.mfu, help="share of the peak reached")
    parser.add_argument("--chips", type=int, default=Terms.chips)
    parser.add_argument("--price", type=float, help="of a chip-hour, in any currency")
    given = parser.parse_intermixed_args(arguments)
    terms = Terms(given.hardware, given.mfu, given.chips, given.price)
    run = to_run(composed(given.recipe, ["run_dir=null", *given.overrides]))
    for what, how_much in forecast(run, terms):
        print(f"{what:12} {how_much}")


def check_help() -> str:
    from nfnets_xla import forecast

    return str(forecast.__doc__)


def checkpoint(arguments: list[str]) -> int:
    from nfnets_xla.checkpoint_cli import checkpoints

    return checkpoints(arguments)


def runs(arguments: list[str]) -> None:
    from nfnets_xla import overview

    overview.runs(arguments)


def audit(arguments: list[str]) -> None:
    from nfnets_xla.ledger import audit as audited

    parser = Parser(prog="nfnets-xla audit", description=audited.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with trainer.ledger=true")
    found = audited(parser.parse_args(arguments).run)
    print("\n".join(found.report()))
    if found.faults:
        sys.exit(1)


def scaling(arguments: list[str]) -> None:
    needs_scipy("scaling")
    from nfnets_xla import scaling_cli

    scaling_cli.scaling(arguments)


def two_trials(arguments: list[str], preemption: Preemption) -> None:
    needs_scipy("two_trials")
    from nfnets_xla import trials

    parser = Parser(prog="nfnets-xla two_trials", description=trials.__doc__)
    parser.add_argument("recipe", help="one that sweeps: lr_sweep, scaling_sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    compose.two_trials(given.recipe, given.overrides, preemption)


def needs_scipy(command: str) -> None:
    if find_spec("scipy") is None:
        raise ValueError(f"{command} needs scipy: pip install 'nfnets_xla[scaling]'")


def models(arguments: list[str]) -> None:
    from nfnets_xla.models.registry import card, full_card, list_models

    names = list_models(*arguments[:1])
    if names == arguments[:1]:
        print(full_card(names[0]))
        return
    if not names:
        raise ValueError(f"no model matches {arguments[0]!r}: see nfnets-xla models")
    for name in names:
        print(card(name))


def predict(arguments: list[str]) -> None:
    from nfnets_xla.predict import predict as predicted

    predicted(arguments)


def signal(arguments: list[str]) -> None:
    """Prints a table, and draws it."""
    import torch

    from nfnets_xla import propagation
    from nfnets_xla.models.registry import create_model

    parser = Parser(prog="nfnets-xla signal", description=propagation.__doc__)
    parser.add_argument("name", help="a name of `nfnets-xla models`")
    parser.add_argument("--out", type=Path, help="PNG to write; NAME-signal.png if not given")
    parser.add_argument(
        "--size", type=int, help="pixels; what the model is trained at if not given"
    )
    parser.add_argument("--batch", type=int, default=8, help="rows of noise")
    parser.add_argument("--checkpoint", help="trained weights, as they are; else new ones")
    parser.add_argument("--seed", type=int, default=0, help="of new weights and of the noise")
    given = parser.parse_args(arguments)
    if given.batch < 1 or (given.size is not None and given.size < 1):
        raise ValueError(
            f"--batch is {given.batch} and --size {given.size}; they must be 1 or more"
        )
    torch.manual_seed(given.seed)
    net = create_model(given.name, checkpoint_path=given.checkpoint)
    title = f"{given.name}, {given.checkpoint or 'new weights, skip gains 1'}, Gaussian noise"
    if given.checkpoint is None:
        propagation.open_branches(net)
    size = given.size or getattr(getattr(net, "variant", None), "train_size", 224)
    found = propagation.signals(net, torch.randn(given.batch, 3, size, size))
    print(propagation.table(found))
    out = given.out or Path(f"{given.name}-signal.png")
    propagation.draw(found, out, f"{title}, {given.batch} x {size} px")
    print(f"{out}: {len(found)} blocks")


def convert(arguments: list[str]) -> None:
    """`convert SRC DST --model NAME`; the form of SRC is told by its content."""
    from nfnets_xla.models.convert import TARGETS, convert_weights

    parser = Parser(prog="nfnets-xla convert", description=convert_weights.__doc__)
    parser.add_argument("source", help="file of weights of any form, or its http(s) address")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--model", required=True, help="a name of `nfnets-xla models`")
    parser.add_argument("--to", choices=TARGETS, default="ours", help="whose names to write")
    parser.add_argument("--plus-bottleneck", choices=("code", "paper"), default="code")
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
            on_progress=progress("fetched"),
        )
    )


def one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(
        error, InterpolationResolutionError
    ):  # a resolver's words, among names of classes
        text = text.partition("raised while resolving interpolation: ")[2].split("\n")[0] or text
    return " ".join(text.split())
