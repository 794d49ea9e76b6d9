"""Rates of an interval, from clocks and counts that the test sets."""

from typing import Any

import pytest

from nfnets_xla import monitor
from nfnets_xla.display import summary
from nfnets_xla.monitor import Peaks, _Interval


def test_rates_are_of_the_interval_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now)
    interval = _Interval({"executions": 7, "execute_seconds": 3.0, "fallbacks": {"aten::x": 1}})
    for _ in range(4):
        interval.batch_asked()
        now += 0.5
        interval.batch_came()
        now += 1.5
        interval.step_went(images=10)
    counts = {"executions": 11, "execute_seconds": 5.0, "fallbacks": {"aten::x": 1}}
    assert interval.rates(Peaks(1000.0, 30.0, 40.0), counts) == {
        "images_per_second": 5.0,  # 40 in 8 s
        "step_ms": 2000.0,
        "mfu": 0.15,
        "hfu": 0.2,
        "data_wait_share": 0.25,
        "executions": 4,
        "execute_ms": 500.0,  # a step
    }


def test_a_peak_that_is_not_known_gives_no_share() -> None:
    assert Peaks(None, 30.0, 40.0).shares(5.0) == {"mfu": None, "hfu": None}


def test_the_account_of_a_run_for_a_person() -> None:
    row: dict[str, Any] = {"images_per_second": 812.3, "step_ms": 39.4, "mfu": 0.4, "hfu": 0.5}
    row |= {"data_wait_share": 0.02, "lost_seconds": 75.0, "compilations": 2, "executions": 44}
    row |= {"compile_seconds": 46.2, "tensors_to_host": 9, "fallbacks": {"aten::nonzero": 3}}
    assert summary(row) == [
        "typical step: 39 ms, 812 images/s, MFU 40.0%, HFU 50.0%, waiting for data 2%",
        "compiled 2 graphs in 46 s; 44 executions, 9 reads from the device; operations that ran on "
        "the host: aten::nonzero",
        "lost to restarts: 0:01:15",
    ]
    assert summary({"lost_seconds": 0.0}) == []  # resumed at its last step, on a CPU
