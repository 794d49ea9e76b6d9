"""The table of hardware, and how far parameters are cut to fit into it."""

import math

import pytest

from nfnets_xla.devices import DEVICES, GIB, find_device, measured_cpu_peak, smallest_fsdp


@pytest.mark.parametrize(
    ("kind", "name"),
    [("v4-8", "v4"), ("TPU v4", "v4"), ("v5litepod-16", "v5e"), ("NVIDIA H100 80GB HBM3", "H100")],
)
def test_hardware_is_found_by_what_the_runtime_calls_it(kind: str, name: str) -> None:
    assert find_device(kind) is DEVICES[name]


def test_a_cpu_is_measured() -> None:
    assert find_device("AMD EPYC") is None
    assert math.isfinite(measured_cpu_peak())


def test_a_v4_core_has_the_peak_that_the_papers_core_hours_are_counted_with() -> None:
    assert DEVICES["v4"].peak_flops / DEVICES["v4"].cores == 137.5e12


def test_parameters_are_cut_as_little_as_fits() -> None:
    """In half of 32 GiB; five copies of parameters, for example."""
    v4 = DEVICES["v4"]
    assert smallest_fsdp(5 * 4 * 829_551_960, v4, 64) == 1  # F7+, 3.1 GiB
    assert smallest_fsdp(int(16.5 * GIB), v4, 64) == 2
    assert smallest_fsdp(int(45 * GIB), v4, 12) == 3
    assert smallest_fsdp(int(45 * GIB), None, 12) == 1
    with pytest.raises(ValueError, match="use more devices"):
        smallest_fsdp(200 * GIB, v4, 8)
