"""Maps a pure function over shards with joblib: locally, or on a Ray or Dask cluster."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from nfnets_xla.exits import Failed

In = TypeVar("In")
Out = TypeVar("Out")
Progress = Callable[[int, int], None]  # done, of how many

ENGINES = ("local", "ray", "dask")
# Jobs per worker between two progress reports: joblib's clusters cannot report single jobs.
PER_WORKER = 16


def map_jobs(
    function: Callable[[In], Out],
    items: Sequence[In],
    *,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> Iterator[Out]:
    """`function(item) for item in items`, `jobs` at a time (-1: one per core).

    `ray` and `dask` use the cluster named by their environment variables or settings, else this
    machine; all machines of a cluster must see the same folder. Raises ValueError for an engine
    that is not installed, Failed if a process dies, and what `function` raises.
    """
    from joblib import Parallel, delayed, effective_n_jobs, parallel_config
    from joblib.externals.loky.process_executor import BrokenProcessPool

    if jobs < 1 and jobs != -1:
        raise ValueError(f"jobs is {jobs}; it must be 1 or more, or -1: one per core")
    done = 0
    with (
        _cluster(engine),
        parallel_config(backend=_BACKENDS[engine], n_jobs=jobs, **_OPTIONS.get(engine, {})),
    ):
        part = PER_WORKER * max(1, effective_n_jobs(jobs))
        with Parallel() as parallel:
            for first in range(0, len(items), part):
                try:
                    some: Any = parallel(delayed(function)(i) for i in items[first : first + part])
                except (BrokenProcessPool, BrokenPipeError) as error:
                    raise Failed(
                        "a process that did a part of the work was killed, perhaps for memory: "
                        "give the command again, with fewer --jobs"
                    ) from error
                yield from some
                done += len(some)
                if on_progress:
                    on_progress(done, len(items))


_BACKENDS = {"local": "loky", "ray": "ray", "dask": "dask"}
# Each Ray worker reserves a core; by Ray's default it would reserve none, and all run on one node.
# Local workers ignore Ctrl-C, which a terminal sends to all processes: this process ends them.
_OPTIONS: dict[str, dict[str, Any]] = {
    "local": {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)},
    "ray": {"ray_remote_args": {"num_cpus": 1}},
}


def _cluster(engine: str) -> AbstractContextManager[object]:
    """Connects to the engine's cluster and registers it with joblib."""
    from contextlib import nullcontext
    from importlib import import_module

    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if engine == "local":
        return nullcontext()
    name = {"ray": "ray.util.joblib", "dask": "distributed"}[engine]
    try:
        module: Any = import_module(name)
    except ImportError as error:
        raise ValueError(
            f"engine is {engine}, which is not installed ({error}): pip install "
            f"{'ray' if engine == 'ray' else 'dask distributed'}, or use engine local"
        ) from error
    if engine == "dask":
        return module.Client()  # reads DASK_SCHEDULER_ADDRESS
    ray = import_module("ray")
    if not ray.is_initialized():  # joblib asks for the number of cores before it would do so
        ray.init(log_to_driver=False)  # reads RAY_ADDRESS
    module.register_ray()
    return nullcontext()
