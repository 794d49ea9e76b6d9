"""`nfnets-xla scaling` as a user types it: what it prints, what it refuses, and without torch."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.scaling.account import macs_per_image
from nfnets_xla.steps import make_schedule
from tests.scaling.made_runs import IMAGES, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four sizes by four lengths by two rates; L = 1.5 + A / M^0.4 + B / D^0.4, within 0.3 %."""
    cells = product((0, 1, 3, 7), (0.5, 1, 2, 4), (0.1, 0.2))
    for number, (size, epochs, rate) in enumerate(cells):
        model = f"nfnet_mini_f{size}"
        macs, rows = macs_per_image(model, 32, 200), epochs * IMAGES
        loss = 1.5 + 3e2 * macs**-0.4 + 1e2 * rows**-0.4
        loss = loss * (1 + 0.003 * (number // 2 * 7 % 5 - 2) / 2) + (0.02 if rate == 0.2 else 0)
        write_run(
            tmp_path / f"run{number}", loss=float(loss), model=model, epochs=epochs, rate=rate
        )
    return tmp_path


def test_a_plan_by_the_papers_rules(capsys: pytest.CaptureFixture[str]) -> None:
    main(["scaling", "plan", "--core-hours", "110000", "--cores", "1024", "--price", "3"])
    out = capsys.readouterr().out
    assert "model       nfnet_f7_plus, 100.7 GMACs an image   (paper: size and epochs" in out
    assert "55,000 chip-hours = 165,000 at 3 a chip-hour of v4" in out
    assert "wall clock  107.4 hours a trial on 1024 cores" in out


def test_a_plan_by_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images, batch and classes are the runs'; a loss extrapolated far comes with a warning."""
    main(["scaling", "plan", "--core-hours", "1e-4", "--runs", str(runs)])
    out = capsys.readouterr().out
    assert f"of {IMAGES:,} images" in out
    assert "fitted here: size ~ C^0.5" in out
    assert "try optim.peak_lr=0.32 and 0.16, per 256 rows (0.1 and 0.05 per batch)" in out
    assert "(0.1 was best for nfnet_mini_f" in out
    main(["scaling", "plan", "--core-hours", "1", "--runs", str(runs)])
    plan, remarks = capsys.readouterr()
    assert "decades beyond the fitted runs" in remarks
    assert "warning" not in out + plan  # stdout, which may be piped, has the answer only


def test_a_model_and_its_epochs_have_a_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's largest run, at its own utilisation; and the same in reverse."""
    main(["scaling", "plan", "--model", "nfnet_f7_plus", "--epochs", "8", "--images", "4e9"])
    out = capsys.readouterr().out
    assert "1.085e+05 core-hours = 5.427e+04 chip-hours of v4" in out
    assert "nfnet_f7_plus, 100.7 GMACs an image   (given)" in out
    assert "8 of 4,000,000,000 images   (given)" in out
    main(["scaling", "plan", "--model", "nfnet_f7_plus", "--core-hours", "108535"])
    assert "8 of 4,000,000,000 images   (spends the budget)" in capsys.readouterr().out
    main(["scaling", "plan", "--model", "nfnet_f0", "--core-hours", "400", "--image-size", "112"])
    assert "nfnet_f0, 2.4" in capsys.readouterr().out
    main(["scaling", "plan", "--core-hours", "1"])
    out = capsys.readouterr().out
    assert "fewer than the 5,000 of the recipe's warm-up" in out
    advice = re.findall(r"warm-up: give (.*)\)", out)[0].split()
    run = to_run(composed("pretrain", ["data.shards=x", "run_dir=y", "optim.epochs=1", *advice]))
    assert make_schedule(run, SimpleNamespace(num_samples=4096, num_steps=100)).warmup_steps == 5  # type: ignore[arg-type]


def test_a_plan_by_runs_is_for_their_images(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("images", "4000000000"), ("image_size", "224")):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(SystemExit) as stopped:
            main(["scaling", "plan", "--core-hours", "5", option, value, "--runs", str(runs)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} is {value}, but " in line
        assert " in the runs: their losses, rates and epochs hold only for their own images" in line


def test_in_a_terminal_no_line_is_wider_than_it(runs: Path) -> None:
    pty = "import pty, sys; pty.spawn([sys.executable, '-m', 'nfnets_xla', *sys.argv[1:]])"
    for words in (["plan", "--core-hours", "5000"], ["fit", str(runs)]):
        done = subprocess.run(
            [sys.executable, "-c", pty, "scaling", *words],
            env={**os.environ, "COLUMNS": "80"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert max(map(len, done.stdout.splitlines())) <= 80
        plain = subprocess.run(
            [sys.executable, "-m", "nfnets_xla", "scaling", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        assert max(map(len, plain.stdout.splitlines())) > 80
        assert done.stdout.split() == plain.stdout.split()


def test_a_fit_says_what_the_runs_hold(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["scaling", "fit", str(runs)])
    out = capsys.readouterr().out
    assert "a x^-b: b = 0.1" in out
    assert "L(M, D): the same rate is within the interval: size ~ C^0." in out
    assert "the best rate never rises with epochs or size" in out
    assert "in 16 of 16 cells the best rate is the lowest or highest tried" in out


def test_two_runs_say_why_nothing_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        write_run(tmp_path / f"{epochs}", loss=3 - epochs, epochs=epochs)
    main(["scaling", "fit", str(tmp_path)])
    out = capsys.readouterr().out
    assert "power: found 2 distinct points; the form power needs at least 3" in out
    assert "one rate was tried for each model and number of epochs" in out


def test_without_restarts_nothing_may_be_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", loss=2)
    write_run(tmp_path / "a", loss=2)  # a second start
    for command in (["fit"], ["figures", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stopped:
            main(["scaling", *command, str(tmp_path), "--without-restarts"])
        assert stopped.value.code == 2
        assert "no finished run that was never restarted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "give core-hours, alone or with a model, or a model and epochs"),
        (["plan", "--epochs", "3"], "the model is None and epochs are 3.0: give"),
        (["plan", "--core-hours", "5", "--model", "nfnet_f0", "--epochs", "3"], "core-hours are 5"),
        (["plan", "--core-hours", "5", "--model", "F9"], "model is 'F9'; it must be an NFNet"),
        (["plan", "--core-hours", "5", "--cores", "301"], "multiple of 2, which a chip of v4 has"),
        (["plan", "--core-hours", "5", "--images", "4.5"], "4.5 is not a whole number"),
        (["plan", "--core-hours", "-5"], "core_hours is -5; it must be finite and greater than 0"),
        (["plan", "--core-hours", "5", "--hardware", "v9"], "invalid choice: 'v9'"),
        (["plan", "--core-hours", "5", "--mfu", "36"], "36 % is 0.36"),
        (["fit", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["scaling", *words])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_torch_is_not_needed(runs: Path) -> None:
    """A process that cannot import torch, nor what training needs, still plans and fits."""
    missing = ("torch", "timm", "lightning", "webdataset", "joblib", "fsspec", "PIL", "simplejpeg")
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {missing!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from nfnets_xla.cli import main\n"
        "main(['scaling', 'plan', '--core-hours', '5000'])\n"
        f"main(['scaling', 'fit', {str(runs)!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nfnet_f3, 33.34 GMACs" in done.stdout
    assert "a x^-b: b = 0.1" in done.stdout
