"""The table of hardware, and over how many devices parameters are sharded to fit."""

import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from lightning.pytorch.plugins import MixedPrecision

from nfnets_xla import devices, xla
from nfnets_xla.devices import GIB, HARDWARE, find_device, measured_cpu_peak, smallest_fsdp
from nfnets_xla.strategy import SPMDStrategy, XLAAccelerator
from tests.data.server import serving


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("v4-8", "v4"),
        ("TPU v4", "v4"),
        ("v5litepod-16", "v5e"),
        ("v5p-8", "v5p"),
        ("v6e-16", "v6e"),
        ("tpu7x-8", "v7"),
        ("NVIDIA H100 80GB HBM3", "H100"),
    ],
)
def test_hardware_is_found_by_what_the_runtime_calls_it(kind: str, name: str) -> None:
    assert find_device(kind) is HARDWARE[name]


def test_how_many_devices_the_strategy_is_given() -> None:
    assert [XLAAccelerator.parse_devices(given) for given in (4, "4")] == [4, 4]
    for wrong in ([0, 1], 0, -2, 1.5, "many"):
        with pytest.raises(ValueError, match=re.escape(f"devices={wrong!r}: one process drives")):
            XLAAccelerator.parse_devices(wrong)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_strategy_refuses_autocast(precision: Literal["bf16-mixed", "16-mixed"]) -> None:
    said = f"precision is '{precision}', and xla_spmd has no autocast: give precision='bf16-true'"
    with pytest.raises(ValueError, match=said):
        SPMDStrategy().precision_plugin = MixedPrecision(precision, "cpu")


def test_a_network_card_of_google_is_no_tpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "PCI_DEVICES", tmp_path)
    assert not devices.tpu_is_attached()
    for name, vendor, device, attached in (
        ("gpu", "0x10de", "0x0027", False),
        ("gvnic", "0x1ae0", "0x0042", False),
        ("v4", "0x1ae0", "0x005e", True),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
        assert devices.tpu_is_attached() == attached


def test_a_tpu_is_called_what_its_machine_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a VM the metadata server's name, on GKE the environment's; without either it is still a
    TPU."""
    tpu = pytest.importorskip("torch_xla._internal.tpu", exc_type=ModuleNotFoundError)
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    attributes = tmp_path / "instance" / "attributes"
    attributes.mkdir(parents=True)
    (attributes / "tpu-env").write_text("ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '0'\n")
    with serving(tmp_path) as server:
        monkeypatch.setattr(tpu, "_GCE_METADATA_ROOT_URL", server.url)
        assert xla.device_kind() == "v5litepod-16"
        (attributes / "tpu-env").unlink()
        assert xla.device_kind() == "TPU"
    assert xla.device_kind() == "TPU"
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "true")
    assert xla.device_kind() == "TPU"
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-16")
    assert xla.device_kind() == "v6e-16"


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fastest product, which takes a second here; the others take 5, 9, ..."""
    assert find_device("AMD EPYC") is None
    squares = (float(n * n) for n in count())
    clock = SimpleNamespace(perf_counter=lambda: next(squares))
    monkeypatch.setattr("nfnets_xla.devices.time", clock)
    assert measured_cpu_peak() == 2 * 1024**3


def test_a_v4_core_has_the_peak_that_the_papers_core_hours_are_counted_with() -> None:
    assert HARDWARE["v4"].peak_flops / HARDWARE["v4"].cores == 137.5e12


def test_half_a_v7_chip_is_a_device() -> None:
    """Of 2307 TFLOP/s and 192 GiB, according to Cloud TPU's documentation of TPU7x."""
    v7 = HARDWARE["v7"]
    assert (2 * v7.peak_flops, 2 * v7.memory, v7.cores) == (2307e12, 192 * GIB, 1)
    assert smallest_fsdp(60 * GIB, v7, 2) == 2


def test_parameters_are_cut_as_little_as_fits() -> None:
    """They must fit in half of 32 GiB; here five copies of the parameters."""
    v4 = HARDWARE["v4"]
    assert smallest_fsdp(5 * 4 * 829_551_960, v4, 64) == 1  # F7+, 3.1 GiB
    assert smallest_fsdp(int(16.5 * GIB), v4, 64) == 2
    assert smallest_fsdp(int(45 * GIB), v4, 12) == 3
    assert smallest_fsdp(int(45 * GIB), None, 12) == 1
    with pytest.raises(ValueError, match="use more devices"):
        smallest_fsdp(200 * GIB, v4, 8)
