"""A cloud in a folder, for tests of `nfnets-xla launch`: queued resources, workers, and `gcloud`.

`Cloud(folder)` puts a `gcloud` on the PATH that keeps its state in the folder. A worker is a home
directory. What gcloud would run there over ssh really runs there, with `sudo`, `python3`, `uv` and
the library itself replaced by small scripts. A slice of two workers advances through STATES, one
per query; it is pre-empted when all its runs hang.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STATES = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
WORKERS = 2

# What each start of the library does on a worker: one line of `plan` per start, in order.
LIBRARY = r"""#!/bin/bash
[ -e "$HOME/mounted" ] || exit 2  # there is no run_dir
echo "$*" >> "$CLOUD/runs-$WORKER"
step=$(sed -n "$(wc -l < "$CLOUD/runs-$WORKER")p" "$CLOUD/plan")
if [ "$step" = hang ]; then echo "$$ $PPID" > "$HOME/hung"; exec sleep 60; fi
if [ "$step" = wait ]; then
    trap 'exit 75' TERM
    touch "$HOME/waits"
    while :; do sleep 0.05; done
fi
exit "$step"
"""
UV = """#!/bin/bash
echo "uv $*" >> "$CLOUD/calls"
[ "$1" != venv ] || { mkdir -p venv/bin; touch venv/bin/python; chmod +x venv/bin/python; }
[ "$2" != install ] || { cp "$CLOUD/library" venv/bin/nfnets-xla; chmod +x venv/bin/nfnets-xla; }
"""
ON_A_WORKER = {
    "mountpoint": '#!/bin/bash\ntest -e "$HOME/mounted"\n',
    "sleep": '#!/bin/bash\n[ "$1" != 10 ] || set -- 0.05\nexec /bin/sleep "$@"\n',
    "sudo": (
        '#!/bin/bash\necho "sudo $*" >> "$CLOUD/calls"\n'
        'while [ "$1" = mount ] && [ -e "$CLOUD/slow" ]; do /bin/sleep 0.05; done\n'
        '[ "$1" != mount ] || touch "$HOME/mounted"\n'
    ),
    "python3": (
        '#!/bin/bash\necho "python3 $*" >> "$CLOUD/calls"\n'
        'mkdir -p "$HOME/.local/bin"; cp "$CLOUD/uv" "$HOME/.local/bin/uv"\n'
    ),
}


class Cloud:
    """The test's view of the cloud."""

    def __init__(self, folder: Path, plan: list[str]) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "plan").write_text("\n".join(plan) + "\n")
        (folder / "library").write_text(LIBRARY)
        (folder / "calls").touch()
        gcloud = f'#!/bin/bash\nCLOUD={folder} exec {sys.executable} {__file__} "$@"\n'
        for name, text in {"gcloud": gcloud, **ON_A_WORKER}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (folder / "uv").write_text(UV)
        (folder / "uv").chmod(0o755)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def verbs(self) -> list[str]:
        """The verbs of gcloud that were called, without queries."""
        verbs = [call.split()[3:5] for call in self.calls() if call.startswith("gcloud ")]
        return [" ".join(verb) for verb in verbs if verb[1] != "describe"]

    def runs(self, worker: int) -> list[str]:
        return (self.folder / f"runs-{worker}").read_text().splitlines()

    def home(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}"


# ---- gcloud -----------------------------------------------------------------------------------


def gcloud(folder: Path, arguments: list[str]) -> int:
    with (folder / "calls").open("a") as calls:
        print("gcloud", " ".join(arguments), file=calls)
    assert arguments[:2] == ["compute", "tpus"]
    assert "--quiet" in arguments
    if (folder / "down").exists():
        (folder / "down").unlink()
        print("ERROR: gcloud crashed\n  the network is down", file=sys.stderr)
        return 1
    if (folder / "hangs").exists():
        (folder / "hangs").unlink()
        time.sleep(60)
    kind, verb, *rest = arguments[2:]
    if kind == "queued-resources":
        return queued_resource(folder, verb, rest)
    homes = [folder / f"worker-{number}" for number in range(WORKERS)]
    chosen = option(rest, "worker")
    for number, home in enumerate(homes):
        if chosen in ("all", str(number)):
            code = on_worker(folder, verb, rest, number, home)
            if code:
                return code
    return 0


def option(arguments: list[str], name: str) -> str:
    (value,) = (a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))
    return value


def queued_resource(folder: Path, verb: str, arguments: list[str]) -> int:
    state, homes = folder / "state", sorted(folder.glob("worker-*"))
    if verb == "create":
        assert not state.exists(), "there is one of that name"
        state.write_text("\n".join(STATES))
    elif not state.exists():
        print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    elif verb == "delete":
        assert "--force" in arguments
        state.unlink()
        remove(homes)
    elif verb == "describe":
        now, *later = state.read_text().split("\n")
        if now == "ACTIVE" and homes and all((home / "hung").exists() for home in homes):
            remove(homes)
            now, later = "SUSPENDING", ["SUSPENDED"]
        elif now == "ACTIVE" and not homes:
            for number in range(WORKERS):
                (folder / f"worker-{number}").mkdir()
        state.write_text("\n".join(later or [now]))
        print(now)
    return 0


def remove(homes: list[Path]) -> None:
    for home in homes:
        if (home / "hung").exists():
            for pid in (
                (home / "hung").read_text().split()[::-1]
            ):  # the loop, then what it waits for
                os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(home)


def on_worker(folder: Path, verb: str, arguments: list[str], number: int, home: Path) -> int:
    if verb == "scp":
        sources = [a for a in arguments if not a.startswith("--")]
        target = home / sources.pop().partition(":")[2]
        assert target.is_dir(), "scp makes no folder"
        for source in sources:
            shutil.copy(source, target)
        return 0
    environment = {
        "HOME": str(home),
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "CLOUD": str(folder),
        "WORKER": str(number),
    }
    command = option(arguments, "command").replace("$(hostname)", f"host-{number}")
    return subprocess.run(
        ["bash", "-c", command], cwd=home, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(gcloud(Path(os.environ["CLOUD"]), sys.argv[1:]))
