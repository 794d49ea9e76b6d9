"""Evaluate given weights on held-out shards: the same graph and numbers as during training."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nfnets_xla import sources
from nfnets_xla.answers import gathered, write
from nfnets_xla.callbacks.missed import Missed
from nfnets_xla.config import Run
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.display import Say, results
from nfnets_xla.inputs import check_cache, count_classes, make_eval_batches, open_index
from nfnets_xla.models.peers import is_peer
from nfnets_xla.models.registry import Network, create_network
from nfnets_xla.network import make_task, put_on_device
from nfnets_xla.record import Discard, RecordWriter, refuse_training
from nfnets_xla.trainer import make_trainer


def evaluate(run: Run, say: Say = print) -> dict[str, Any]:
    """Loss, top-1 and top-5 of `model.init_from` on `data.eval_shards`, printed and returned.

    With `run_dir` they are also written there as a record, with the results per class and image
    (answers.py). A classifier of another size is an error here, and never replaced.
    """
    if run.data.eval_shards is None:
        raise ValueError("data.eval_shards is not set; it must name a folder of indexed shards")
    refuse_training(run.run_dir)
    check_cache(run)
    held_out = open_index(run, run.data.eval_shards)
    net, source, num_classes = trained(run, held_out)
    backend = put_on_device(net, run, trains=False)
    task = make_task(net, run, backend, torch.float32)
    hosts = backend.hosts
    dataset = make_eval_batches(run, held_out, num_classes, hosts)
    loader = Batches(dataset, start_step=0, stop_step=len(dataset), workers=run.data.workers)
    task.keep_answers = run.run_dir is not None
    kept = {"having a run_dir": task.keep_answers}  # all hosts must gather, or none
    hosts.agree({**run.shared(), **kept, "the held-out samples": held_out.fingerprint})
    say = say if hosts.writes else lambda _: None
    header = {"resumed_from": 0, "config": asdict(run), "fingerprint": held_out.fingerprint}
    keeps = run.run_dir is not None and hosts.writes
    with (
        RecordWriter(Path(run.run_dir or ""), header) if keeps else Discard() as record,
        closing(loader),
    ):
        missed = Missed(
            record,
            ceiling=run.data.max_missed,
            unique_per_step=0,
            train_samples=0,
            eval_samples=held_out.num_samples,
            before=0,
            hosts=hosts,
            say=say,
        )
        trainer = make_trainer(run, backend, [missed])
        trainer.validate(task, loader, verbose=False)
        (metrics,) = task.evaluation.values()
        say(f"{source}: {results(metrics)}  on {metrics['images']} images of {held_out.folder}")
        record.write("eval", 0, weights=run.model.init_weights, **metrics)
        if task.answers_NA is not None:
            answers = gathered(task.answers_NA, dataset, hosts)
            if isinstance(record, RecordWriter):
                about = {"weights": source, "shards": str(held_out.folder), **metrics}
                write(record.path.parent, record.attempt, answers, dataset, about, say)
        record.write("end", 0, missed=missed.evaluated, **backend.report())
    return metrics


def trained(run: Run, held_out: ShardIndex) -> tuple[Network, str, int]:
    """The network with the weights to evaluate, their source, and its number of classes.

    The weights decide that number: the shards' labels may not include every class.
    """
    num_classes = count_classes(run, held_out)
    name, tag = run.model.name, run.model.pretrained
    if tag is not None and not is_peer(name):
        net = create_network(f"{name}.{tag}", pretrained=True)
        check_head(net.num_classes, num_classes, f"{name}.{tag}")
        return net, f"{name}.{tag}", net.num_classes
    if run.model.init_from is None:
        raise ValueError("model.init_from is not set; it must name the weights to evaluate")
    found = sources.find_weights(run.model.init_from, run.model.init_weights)
    options: dict[str, Any] = {}
    if is_peer(name):  # a ViT is built for the size its weights were trained at, if known
        evaluated = run.data.eval_image_size
        trained_at = evaluated if found.sizes is None else found.sizes.train
        options = {"image_size": trained_at, "eval_image_size": evaluated}
    net = found.network(name, **options)
    check_head(net.num_classes, num_classes, found.source)
    return net, found.source, net.num_classes


def check_head(has: int, needed: int, source: str) -> None:
    if has < needed:
        raise ValueError(
            f"{source} knows {has} classes, and the shards' labels, or data.num_classes, have "
            f"{needed}: evaluate it on shards of its own classes"
        )
