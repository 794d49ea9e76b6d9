"""`nfnets-xla checkpoint ...`: verify, show, export and describe what a run has saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfnets_xla import checkpoint, sources
from nfnets_xla.arguments import Parser
from nfnets_xla.checkpoint import Checkpoint
from nfnets_xla.data.storage import address
from nfnets_xla.models.card import write_card
from nfnets_xla.models.convert import TARGETS, check_target, convert_weights
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import is_peer
from nfnets_xla.models.timm_names import Sizes
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import load_into, save_tensors
from nfnets_xla.record import has_record, read_record


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 if `verify` found a checkpoint that does not verify."""
    given = parser().parse_args(arguments)
    return given.run(given) or 0


def parser() -> Parser:
    top = Parser(
        prog="nfnets-xla checkpoint",
        description="WHERE is the folder or address of a run, of its checkpoints, or of one.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for name, run, purpose in (
        ("verify", verify, "compare every file with its size and SHA-256"),
        ("show", show, "describe the newest checkpoint"),
        ("export", export, "write the newest checkpoint's weights to a .safetensors file"),
        ("card", card, "write a folder for create_model('local-dir:FOLDER'), ours or timm's"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument(
            "where", help="a run, its checkpoints or one of these: folder or address"
        )
        command.set_defaults(run=run)
        if name == "export":
            command.add_argument("target", type=Path, help="file to write")
            command.add_argument(
                "--ema", action="store_true", help="use the moving average of the weights"
            )
            command.add_argument(
                "--to", choices=TARGETS, default="ours", help="whose names to write"
            )
            command.add_argument("--force", action="store_true", help="overwrite the target")
        if name == "card":
            command.add_argument("folder", type=Path, help="folder to write, new")
            command.add_argument(
                "--ema", action="store_true", help="use the moving average of the weights"
            )
    return top


def verify(given: Any) -> int:
    where, faults = given.where, 0
    root = where if address(where) else sources.checkpoints_of(Path(where))
    folders = checkpoint.folders(root)
    if not folders and checkpoint.is_one(where):
        folders = [where]
    if not folders:
        raise ValueError(f"{given.where} holds no checkpoint: give a run's folder, or a checkpoint")
    for each in map(verified, folders):
        faults += isinstance(each, str)
        print(each if isinstance(each, str) else one_line(each))
    return 1 if faults else 0


def verified(where: str) -> Checkpoint | str:
    """The checkpoint, or why it cannot be verified, so that the others still are."""
    try:
        return checkpoint.verify_one(where)
    except checkpoint.Newer as newer:
        return str(newer)


def one_line(found: Checkpoint) -> str:
    size = sum(path.stat().st_size for path in found.folder.iterdir())
    return f"{found}: verified; {', '.join(found.forms)}; {size / 1e6:,.1f} MB"


def show(given: Any) -> None:
    found = newest(given.where)
    print(one_line(found))
    state = found.state
    identity = state["identity"]
    shown = {
        "step": found.step,
        "samples": state.get("samples"),
        "hours of the run": round(state.get("seconds", 0.0) / 3600, 2),
        "model": identity["model"]["name"],
        "classes": identity["num_classes"],
        "seed": identity["seed"],
        "shards": identity["shards"][:16],
        "recipe": state.get("recipe", "")[:16],
        **state.get("versions", {}),
    }
    for name, value in shown.items():
        print(f"{name:18} {value}")
    for form in found.forms:
        tensors = found.tensors(form)
        count = sum(tensor.numel() for tensor in tensors.values())
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        print(
            f"{form:18} {len(tensors)} tensors, {count:,} numbers", "" if finite else "NOT FINITE"
        )


def export(given: Any) -> None:
    found = newest(given.where)
    form = form_of(found, given.ema)
    file = found.folder / f"{form}.safetensors"
    name = found.state["identity"]["model"]["name"]
    if not is_peer(name):
        print(convert_weights(str(file), given.target, model=name, to=given.to, force=given.force))
        return
    if given.to != "ours":
        raise ValueError(
            f"{found} is of {name}: {given.to}'s names exist only for NFNets; leave out --to"
        )
    check_target(given.target, given.force)
    about = {"model": name, "provenance": f"{name}, update {found.step}", "names": given.to}
    save_tensors(found.tensors(form), given.target, about)
    print(f"{given.target}: {name}, as it was saved, from {file}")


def card(given: Any) -> None:
    found = newest(given.where)
    form = form_of(found, given.ema)
    identity = found.state["identity"]
    name = identity["model"]["name"]
    if is_peer(name):
        raise ValueError(f"{found} is of {name}: cards are only for NFNets")
    net = NFNet(VARIANTS[name], num_classes=identity["num_classes"])
    load_into(net, found.tensors(form), source=str(found))
    data = identity["data"]
    sizes = Sizes.of_run(data)
    facts = {
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "cost": f"{net.macs(sizes.test) / 1e9:.3f} GMACs at {sizes.test} px",
        "classes": identity["num_classes"],
        "trained at": f"{sizes.train} px, {found.step:,} updates of {data['batch_size']} rows",
        "weights": "their moving average" if form == "ema" else "of the last update",
        **held_out(Path(given.where), found.step, "ema" if given.ema else "raw"),
        "shards": f"fingerprint {identity['shards']}",
        "recipe": found.state.get("recipe", "")[:16],
        **found.state.get("versions", {}),
    }
    provenance, loss = f"{name}, update {found.step}", identity["optim"]["loss"]
    write_card(net, name, given.folder, facts, provenance, sizes, loss)
    print(f"{given.folder}: {name}, {identity['num_classes']} classes, from {found}")


def held_out(run_dir: Path, step: int, weights: str) -> dict[str, str]:
    """The held-out results of these weights in the run's record, if there is one."""
    if not has_record(run_dir):
        return {}
    rows = read_record(run_dir).of_kind("eval")
    row = next((r for r in rows if (r["step"], r["weights"]) == (step, weights)), None)
    if row is None:
        return {}
    if row["loss"] is None:
        return {"held out": f"a loss that is not finite, on {row['images']:,} images"}
    shares = f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, loss {row['loss']:.4f}"
    return {"held out": f"{shares} on {row['images']:,} images"}


def form_of(found: Checkpoint, ema: bool) -> str:
    if ema and "ema" not in found.forms:
        raise ValueError(f"{found} holds no moving average: leave out --ema")
    return "ema" if ema else "model"


def newest(where: str) -> Checkpoint:
    found = sources.find(where)
    if found is None:
        raise ValueError(
            f"{where} holds no checkpoint that verifies: give a run's folder, or a checkpoint"
        )
    return found
