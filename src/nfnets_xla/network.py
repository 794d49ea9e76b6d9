"""The network of a run: build it, load its weights, put it on the device (stacked or not), and make
its training task."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nfnets_xla import sources
from nfnets_xla.backend import Backend, open_backend
from nfnets_xla.checkpoint import MANIFEST, Checkpoint
from nfnets_xla.config import Run
from nfnets_xla.display import Say
from nfnets_xla.exits import Interrupted
from nfnets_xla.inputs import check_form, untrained
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import (
    Network,
    count_parameters,
    load_pretrained,
    split_tag,
)
from nfnets_xla.models.stacked import as_in, loop, stack
from nfnets_xla.models.weights import load_into
from nfnets_xla.optim.passes import Passes
from nfnets_xla.optim.schedule import Schedule
from nfnets_xla.sources import Weights
from nfnets_xla.steps import kept_copies
from nfnets_xla.task import Classification, Restored

STACKED_FROM = 12  # blocks of the longest stage, under XLA: benchmarks/results/compile.txt


def initial_weights(run: Run) -> Weights | None:
    """The weights that `model.init_from` names, if set. ValueError if there are none."""
    given = run.model.init_from
    return None if given is None else sources.find_weights(given, run.model.init_weights)


def make_model(run: Run, num_classes: int, initial: Weights | None, say: Say) -> Network:
    """The network on the host, with random, public or `initial` weights.

    If given weights have another number of classes, the network gets a new head.
    """
    net = untrained(run, num_classes)
    name, tag = run.model.name, run.model.pretrained
    if run.model.head_bias:  # set before loading: weights with a classifier overwrite it
        bias = net.get_parameter(f"{net.classifier_name}.bias")
        torch.nn.init.constant_(bias, run.model.head_bias)
    if isinstance(net, NFNet) and tag is not None:
        fresh = load_pretrained(net, *split_tag(f"{name}.{tag}"))
        say(f"public weights {name}.{tag}" + (" (new classifier)" if fresh else ""))
    if initial is not None:
        fresh = load_into(net, initial.tensors(), source=initial.source, allow_new_head=True)
        say(f"weights from {initial.source}" + (" (new classifier)" if fresh else ""))
    return net


def put_on_device(net: Network, run: Run, *, trains: bool = True) -> Backend:
    """Opens the run's device, and gives `net` the form in which it runs there (`choose_form`).

    Evaluation keeps only the parameters in memory (`trains=False`). ValueError for batches that
    cannot be split equally among the devices.
    """
    copies = kept_copies(run.optim) if trains else 1
    backend = open_backend(run.trainer, 4 * copies * count_parameters(net))
    for key in ("batch_size", "eval_batch_size") if trains else ("eval_batch_size",):
        rows = getattr(run.data, key)
        if rows % backend.num_devices:
            raise ValueError(
                f"data.{key} is {rows}; it must be a multiple of the {backend.num_devices} devices"
            )
    choose_form(net, run, backend)
    return backend


def choose_form(net: Network, run: Run, backend: Backend) -> None:
    """Choose, in place, how `net` runs: memory format, stacked or not, recomputing or not.

    The run's numbers do not depend on it.
    """
    stacked = run.model.stacked
    if backend.channels_last:  # like the images; before stacking, which makes 5-d tensors
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    check_form(run)
    if not isinstance(net, NFNet):
        return
    if stacked == "auto":
        stacked = backend.scan is not loop and max(net.variant.depth) >= STACKED_FROM
    if stacked:
        stack(net, scan=backend.scan)
    if run.model.recompute:
        net.set_grad_checkpointing(checkpoint=backend.checkpoint)


def make_task(
    net: Network,
    run: Run,
    backend: Backend,
    compute_dtype: torch.dtype,
    *,
    schedule: Schedule | None = None,
    passes: Passes | None = None,
    restored: Restored | None = None,
) -> Classification:
    """A task made without `schedule` and `passes` can only evaluate."""
    return Classification(
        net,
        run.optim,
        compute_dtype=compute_dtype,
        fetch=backend.fetch,
        add_up=backend.add_up,
        compile=backend.compile,
        schedule=schedule,
        passes=passes,
        restored=restored,
        remembered_steps=run.trainer.log_every,  # they are read that often
    )


def restore(net: Network, resume: Checkpoint, run: Run) -> Restored:
    """Load the weights into the network; return the state for the optimizer, made later."""
    with _still_there(resume):
        load_into(net, resume.tensors("model"), source=str(resume))
        ema = None if run.optim.ema_decay is None else resume.tensors("ema")
        kept = [form for form in resume.forms if form not in ("model", "ema")]
        slots = {form: as_in(net, resume.tensors(form)) for form in kept}
    resume.release()
    skipped = int(resume.state.get("skipped", 0))
    return Restored(slots, ema and as_in(net, ema), resume.step - skipped, skipped)


@contextmanager
def _still_there(found: Checkpoint) -> Iterator[None]:
    """Guards the reading of a checkpoint. Raises Interrupted if another start, on another machine,
    deleted it meanwhile to make room for newer ones: its manifest, deleted first, is gone."""
    manifest = found.folder / MANIFEST
    try:
        yield
    except (ValueError, OSError):
        if manifest.is_file():
            raise
    if not manifest.is_file():
        raise Interrupted(
            f"{found} was deleted while it was read, by another start of this run: start again, to "
            "go on from what is there now"
        )
