"""Which backend a run gets on which device, what it refuses, and what it brings along."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nfnets_xla import backend, config, xla
from nfnets_xla.backend import BACKENDS, local_gpu, open_backend
from nfnets_xla.compose import composed, to_run
from nfnets_xla.config import TrainerConfig
from nfnets_xla.devices import find_device
from nfnets_xla.exits import HostLost
from nfnets_xla.hosts import Hosts
from nfnets_xla.inductor import as_it_is, compiled
from nfnets_xla.prepare import make_plan, prepare
from nfnets_xla.train import open_loaders
from tests.runs import PLAIN_CPU, RECIPE, SMALL

GPU = "NVIDIA H100 80GB HBM3"


def trainer(*options: str) -> TrainerConfig:
    return to_run(composed("smoke", ["run_dir=R", "trainer.compile=auto", *options])).trainer


def with_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as opening a backend looks; what it sets for the whole process is caught."""
    for name, fake in (
        ("is_available", lambda: True),
        ("device_count", lambda: count),
        ("set_device", lambda _: None),
        ("get_device_name", lambda _: GPU),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(backend, "choose_by_rule", lambda: None)


def test_every_device_that_a_recipe_can_name_has_a_backend() -> None:
    assert ("auto", *BACKENDS) == config.DEVICES


@pytest.mark.parametrize(
    ("tpu", "gpu", "name"),
    [(True, True, "xla"), (True, False, "xla"), (False, True, "cuda"), (False, False, "cpu")],
)
def test_auto_takes_the_tpu_else_the_gpu_else_the_cpu(
    tpu: bool, gpu: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for each in BACKENDS:
        monkeypatch.setitem(BACKENDS, each, lambda *_, each=each: opened.append(each))
    monkeypatch.setattr(backend, "tpu_is_attached", lambda: tpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    open_backend(trainer("trainer.device=auto"))
    assert opened == [name]


def test_a_cpu_gets_the_plain_form() -> None:
    made = open_backend(trainer("trainer.device=cpu"))
    assert (made.device_kind, made.accelerator, made.num_devices) == ("CPU", "cpu", 1)
    assert (made.compile, made.channels_last, made.pin_memory) == (as_it_is, False, False)
    asked = open_backend(trainer("trainer.device=cpu", "trainer.compile=true"))
    assert asked.compile is compiled


def test_a_gpu_gets_compiled_steps_channels_last_and_pinned_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpus(2, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    made = open_backend(trainer("trainer.device=cuda"))
    known = find_device(GPU)
    assert known is not None
    assert (made.device_kind, made.accelerator, made.num_devices) == (GPU, "cuda", 1)
    assert made.peak_flops == known.peak_flops
    assert made.strategy.root_device == torch.device("cuda", 1)
    assert (made.compile, made.channels_last, made.pin_memory) == (compiled, True, True)
    assert not torch.backends.cudnn.allow_tf32
    eager = open_backend(trainer("trainer.device=cuda", "trainer.compile=false"))
    assert eager.compile is as_it_is


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_are_pinned_where_the_backend_asks_for_it(
    pinned: bool, tmp_path: Path, data: list[str]
) -> None:
    given = [*SMALL, *PLAIN_CPU, *data, *RECIPE[1:], f"run_dir={tmp_path / 'run'}"]
    ready = prepare(make_plan(to_run(composed(RECIPE[0], given))), None, lambda _: None)
    ready = replace(ready, backend=replace(ready.backend, pin_memory=pinned))
    with ExitStack() as open_files:
        loader, _ = open_loaders(ready, open_files)
        assert loader._loader.pin_memory is pinned


def test_what_no_device_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fsdp is 2; on cpu every process keeps"):
        open_backend(trainer("trainer.device=cpu", "trainer.fsdp=2"))
    with_gpus(2, monkeypatch)
    with pytest.raises(ValueError, match="fsdp is 2; on cuda every process keeps"):
        open_backend(trainer("trainer.device=cuda", "trainer.fsdp=2"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK is 2, but torch sees 2 GPUs: start as many"):
        local_gpu()
    with_gpus(0, monkeypatch)
    with pytest.raises(ValueError, match="torch sees no GPU: use trainer"):
        open_backend(trainer("trainer.device=cuda"))


def test_what_is_fetched_is_a_copy() -> None:
    """A checkpoint is written while the next steps change the weights."""
    made = open_backend(trainer("trainer.device=cpu"))
    weight = torch.zeros(3)
    found = made.fetch({"w": weight})["w"]
    weight.add_(1)
    assert found.tolist() == [0, 0, 0]


def test_a_host_that_is_lost_may_show_where_a_result_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs on the devices is waited for there: in the average of a logged step, in a save."""

    def gone(_: object) -> None:
        raise RuntimeError("slice health check failed")

    fakes = {
        "start": lambda _: None,
        "multiply_in_float32": lambda: None,
        "device_kind": lambda: "TPU v4",
    }
    fakes |= {"num_devices": lambda: 8, "make_mesh": lambda fsdp: None, "gather": gone}
    fakes |= {"counters": lambda: None, "open_hosts": lambda: Hosts(1, 2)}
    for name, fake in fakes.items():
        monkeypatch.setattr(xla, name, fake)
    made = open_backend(trainer("trainer.device=xla"))
    with pytest.raises(HostLost, match=r"host 1 of 2 lost another one \(slice health check failed"):
        made.fetch({})
