"""How fast a machine runs the steps of a run, without its data: `nfnets-xla throughput ...`.

The step is that of `train`: the same task, optimizer, strategy and device. One batch of noise goes
through the recipe's whole data pipeline, and is uploaded again for every step, so that nothing is
read or decoded meanwhile. The results are those of a run's record (median images per second, MFU,
compilations) and the peak memory of the device.
"""

import resource
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from nfnets_xla.backend import Backend
from nfnets_xla.config import Run
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import Sample, encode_image, pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.display import Display, Lines, summary
from nfnets_xla.inputs import make_order, make_train_batches
from nfnets_xla.models.registry import count_parameters
from nfnets_xla.network import initial_weights, make_model, make_task, put_on_device
from nfnets_xla.record import Discard, RecordWriter, refuse_training
from nfnets_xla.steps import make_passes, make_schedule
from nfnets_xla.task import Batch
from nfnets_xla.trainer import make_monitor, make_trainer

NOISE = 64  # side of a stored image, in pixels; decoding is not measured
CLASSES = 1000  # if the recipe does not say
MIB = 2**20


class Repeated:
    """The same batch for every step.

    It has no length: Lightning would sum lengths over the devices, in additional graphs.
    """

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield self.batch | {"step": step}


def throughput(run: Run, display: Display | None = None) -> dict[str, Any]:
    """Run `optim.epochs` steps, and return what was measured; kept as a record with `run_dir`.

    One epoch is one batch here. ValueError for settings with which no run would work.
    """
    refuse_training(run.run_dir)
    display = display or Lines()
    with TemporaryDirectory() as folder, ExitStack() as open_files:
        index = noise(run, Path(folder))
        order = make_order(run, index)
        schedule, passes = make_schedule(run, order), make_passes(run, order)
        num_classes = run.data.num_classes or CLASSES
        torch.manual_seed(run.seed)
        net = make_model(run, num_classes, initial_weights(run), display.say)
        backend = put_on_device(net, run)
        compute_dtype = getattr(torch, run.model.compute_dtype)
        task = make_task(net, run, backend, compute_dtype, schedule=schedule, passes=passes)
        batch = make_train_batches(
            run,
            index,
            order,
            num_classes,
            drop_path_rates=net.stochastic_depth_rates,
            num_features=net.num_features,
            hosts=backend.hosts,
        )[0]
        if not backend.hosts.writes:
            display = Lines(lambda _: None)
        display.say(
            f"{run.model.name}: {count_parameters(net):,} parameters; {order.num_steps} steps of "
            f"{run.data.batch_size} rows at {run.data.image_size} px on {backend.num_devices} x "
            f"{backend.device_kind}"
        )
        record = Discard()
        if run.run_dir is not None and backend.hosts.writes:
            opening = {"resumed_from": 0, "config": asdict(run)}
            opening |= {"device_kind": backend.device_kind, "num_devices": backend.num_devices}
            record = open_files.enter_context(RecordWriter(Path(run.run_dir), opening))
        steps = order.num_steps
        monitor = make_monitor(run, net, backend, passes, steps, record, display)
        trainer = make_trainer(run, backend, [monitor], num_steps=steps)
        trainer.fit(task, Repeated(batch, order.num_steps))
        memory = peak_memory(backend)
        result = monitor.summary() | backend.report() | memory
        record.write("end", order.num_steps, **result)
    for line in summary(result):
        display.say(line)
    for name, size in memory.items():
        display.say(f"peak {name.removesuffix('_mib').replace('_', ' ')}: {size:,.0f} MiB")
    return result


def noise(run: Run, folder: Path) -> ShardIndex:
    """Shards of noise, with one image per row of a batch, so that `optim.epochs` counts steps."""
    images = run.data.batch_size  # a step uses batch_size / repeats of them
    rng = np.random.default_rng(0)
    classes = run.data.num_classes or CLASSES

    def samples() -> Iterator[Sample]:
        for number in range(images):
            pixels = rng.integers(0, 256, (NOISE, NOISE, 3), np.uint8)
            yield f"{number:06d}", encode_image(pixels), "png", number % classes

    pack_samples(samples(), folder, samples_per_shard=max(1, images // run.data.num_streams))
    return build_index(folder)


def peak_memory(backend: Backend) -> dict[str, float]:
    """Peak memory in MiB: of this process, and of the device if the runtime reports it."""
    found = {"host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB}
    if (device := backend.peak_memory()) is not None:
        found["device_memory_mib"] = device / MIB
    return found
