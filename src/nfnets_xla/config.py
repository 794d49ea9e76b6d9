"""The vocabulary of a run: one dataclass per group of conf/, composed by `Run`.

A recipe is a complete `Run`: the recipe or the user must set every field. Everything behind the
command line sees only these dataclasses, and no other form of configuration. They are not frozen,
because OmegaConf merges into them.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any

JOBS = ("train", "evaluate", "throughput", "smoke")
DEVICES = ("auto", "xla", "cuda", "cpu")
COMPUTE_DTYPES = ("float32", "bfloat16")
# Each with what it has beyond the common settings, and a usual value of that.
OPTIMIZERS: dict[str, dict[str, float]] = {"sgd": {}, "adamw": {"beta2": 0.999}}
SCHEDULES = ("cosine", "constant", "rsqrt")
LOSSES = ("softmax", "sigmoid")
MIXES = ("none", "mixup_cutmix")
GROUPS = ("model", "data", "optim", "trainer")  # folders of conf/, fields of Run


@dataclass
class ModelConfig:
    name: str  # a name of `nfnets-xla models`
    init_from: str | None  # a run folder, a checkpoint folder or a .safetensors file; None: random
    pretrained: str | None  # instead of init_from: public weights, dm_in1k or dm_in1k_haiku
    init_weights: str  # "raw" or "ema": which weights init_from takes from a checkpoint
    head_bias: float  # initial bias of a new classifier; -10 suits a sigmoid loss
    drop_rate: float  # dropout before the classifier
    drop_path_rate: float  # stochastic depth: block i of N is dropped with rate * i / N
    compute_dtype: str  # of the convolutions in training; weights, loss and evaluation are float32
    stacked: bool | str  # depth as a loop (models/stacked.py): true, false; "auto": if deep
    recompute: bool  # gradient checkpointing of each block: saves memory, costs time


@dataclass
class DataConfig:
    shards: str | None  # folder of indexed WebDataset shards to train on
    eval_shards: str | None  # folder of held-out shards; None: no evaluation
    exclude: str | None  # file of training samples to leave out, one id per line; None: use all
    max_missed: float  # largest share of undecodable samples; beyond it the run stops
    num_classes: int | None  # None: the largest label of both sets of shards, plus one
    image_size: int  # pixels, training
    eval_image_size: int  # pixels, evaluation
    eval_margin: int  # evaluation resizes both sides to eval_image_size + margin, then crops
    flip: bool  # mirror half of the training views
    min_crop_area: float  # smallest share of the image's area that a training crop may show
    randaugment_magnitude: int | None  # NFNet paper: F0 5, F1 and F2 10, larger ones 15; None: off
    randaugment_ops: int  # number of operations applied to each view
    mix: str  # "none", or "mixup_cutmix": MixUp on half of the rows and CutMix on the others
    batch_size: int  # rows of a global batch: unique images x repeats
    eval_batch_size: int  # rows of a global batch, evaluation
    repeats: int  # views of each image in a batch (repeated augmentation)
    num_streams: int  # streams of samples: must divide batch_size / repeats; hosts must divide it
    window_shards: int  # shards shuffled together within a stream
    cache_dir: str | None  # local folder for copies of remote shards
    cache_bytes: float  # size limit of cache_dir; shared by all processes that use it
    workers: int  # loader processes per host; no effect on the batches


@dataclass
class OptimConfig:
    epochs: float  # passes over the training set, in views: an image is read epochs / repeats times
    peak_lr: float  # learning rate for a batch of lr_batch rows
    lr_batch: int | None  # peak_lr is scaled by data.batch_size / lr_batch; None: not scaled
    schedule: str  # after the warm-up: "cosine" to 0, "constant" or "rsqrt"
    warmup_steps: int | None  # linear warm-up from 0; give one of the three warmup_ settings
    warmup_epochs: float | None  # the warm-up in epochs
    warmup_fraction: float | None  # the warm-up as a share of the run
    rsqrt_timescale: int  # steps after the warm-up in which rsqrt falls to peak / sqrt(2)
    cooldown_steps: int  # final steps of constant and rsqrt, in which the rate falls linearly to 0
    optimizer: str  # "sgd", with Nesterov momentum, or "adamw"
    momentum: float  # Nesterov's; AdamW's beta1
    beta2: float | None  # AdamW's; None for an optimizer without
    weight_decay: float  # of weights; gains and biases are not decayed
    clipping: float | None  # AGC's lambda; None: no clipping
    loss: str  # "softmax", or "sigmoid": binary cross-entropy for each class
    label_smoothing: float  # of the targets, after mixing
    accumulation: int  # gradient accumulation: slices of a batch; saves memory, costs time
    sam_rho: float | None  # radius of sharpness-aware minimisation (SAM); None: off
    sam_ascent_fraction: float  # share of the batch used for the ascent; NFNet paper: 0.2
    sam_microbatches: int  # m-sharpness: parts of the batch, each with its own ascent
    sam_adaptive: bool  # ASAM: ascent relative to each weight; use a sam_rho about 10 times larger
    ema_decay: float | None  # decay of the weights' moving average; None: no average
    max_skipped: int  # non-finite updates that may be skipped; one more stops the run


@dataclass
class TrainerConfig:
    device: str  # "auto" takes the TPU, else the GPU, else plain CPU
    virtual_devices: int | None  # number of virtual CPU devices, with device=xla
    fsdp: int | str  # XLA devices that shard one copy of the parameters; "auto": as few as fit
    compile: bool | str  # use torch.compile (without XLA): true, false; "auto": only on a GPU
    log_every: int  # steps between logged steps in the record
    eval_every: int | None  # steps between evaluations; None: only at the end
    checkpoint_every: int | None  # steps between checkpoints; None: only at the end
    checkpoint_dir: str | None  # a folder, gs:// or s3://; None: checkpoints/ in run_dir
    keep_checkpoints: int  # how many of the newest checkpoints to keep
    keep_every_hours: float | None  # also keep the first checkpoint of every N hours of the run
    keep_best: bool  # also keep the checkpoint of the lowest held-out loss
    grace: float  # seconds for saving after a signal to stop; then the process ends, saved or not
    maintenance: str | None  # file or http(s) address polled for notice of this machine's shutdown
    compile_cache: bool  # cache compiled programs in run_dir for restarts, where supported
    tensorboard: bool  # write curves for TensorBoard, besides CSV
    trace_samples: bool  # write the sample ids of every batch into the record
    ledger: bool  # write the numbers of every step's samples, compressed, for `nfnets-xla audit`


@dataclass
class Run:
    job: str  # what the recipe is for: train, evaluate, throughput or smoke
    run_dir: str | None  # folder for everything the run writes; training needs one
    resume: str  # "auto": continue from what run_dir holds; "never"; or a checkpoint to start from
    seed: int  # of the initial weights, the order and every random draw
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig

    def check(self) -> None:
        """Refuse values that cannot work anywhere. Raises ValueError with value, rule and fix."""
        local_run_dir(self.run_dir)
        for name in setting_names():
            if attrgetter(name)(self) == "":
                raise ValueError(f"{name} is empty; give a value, or null")
        for name, allowed in _CHOICES.items():
            _one_of(name, attrgetter(name)(self), allowed)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**32)")
        for holds, rule, settings in _RANGES:
            for group, names in settings.items():
                for name in names.split():
                    value = getattr(getattr(self, group), name)
                    if value is not None and not holds(value):
                        raise ValueError(f"{group}.{name} is {value}; it must be {rule}")
        if self.model.pretrained is not None and self.model.init_from is not None:
            raise ValueError(
                f"model.pretrained is {self.model.pretrained!r} and model.init_from "
                f"{self.model.init_from!r}: two sources of weights; give one"
            )
        _check_form(self.model, self.trainer)
        _check_optim(self.optim)

    def identity(self) -> dict[str, Any]:
        """The settings that determine the run's numbers; a resumed run must have the same.

        The device, the number of workers, the location of the shards, how often something is
        written, and whether the network is stacked or recomputed are not part of it.
        """
        return identity_of(asdict(self))

    def shared(self) -> dict[str, Any]:
        """The settings that must be equal on all hosts, by dotted names."""
        return {name: attrgetter(name)(self) for name in setting_names() if name not in _OF_A_HOST}


# Settings that may differ between hosts: paths (whose contents are compared instead), and how a
# host makes its batches.
_OF_A_HOST = (
    *("run_dir", "resume", "trainer.checkpoint_dir", "trainer.maintenance"),
    *("data.shards", "data.eval_shards", "data.exclude"),
    *("data.cache_dir", "data.cache_bytes", "data.workers"),
)

# Settings that do not affect the numbers, or that are compared by content: samples, including which
# are excluded, by the shards' fingerprint in Plan.identity; initial weights by their hash
# (resume.Beginning). `max_skipped` decides whether a run continues, not its numbers.
_NOT_IDENTITY = {
    "model": ("init_from", "pretrained", "stacked", "recompute"),
    "data": (
        "workers",
        "shards",
        "eval_shards",
        "eval_batch_size",
        "exclude",
        "max_missed",
        "cache_dir",
        "cache_bytes",
    ),
    "optim": ("accumulation", "max_skipped"),
}


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`Run.identity` of a configuration from a record, which may be of another release."""
    parts = {key: v for key, v in config.items() if key not in ("run_dir", "resume", "trainer")}
    for part, names in _NOT_IDENTITY.items():
        if part in parts:
            parts[part] = {key: v for key, v in parts[part].items() if key not in names}
    return parts


def setting_names(of: type[Any] = Run, prefix: str = "") -> list[str]:
    """Dotted names of all settings, in the order of the fields."""
    found: list[str] = []
    for field in fields(of):
        if isinstance(field.type, type) and is_dataclass(field.type):
            found += setting_names(field.type, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


_CHOICES: dict[str, Collection[str]] = {
    "job": JOBS,
    "trainer.device": DEVICES,
    "model.compute_dtype": COMPUTE_DTYPES,
    "model.init_weights": ("raw", "ema"),
    "optim.optimizer": OPTIMIZERS,
    "optim.loss": LOSSES,
    "optim.schedule": SCHEDULES,
    "data.mix": MIXES,
}
# (predicate, the same in words, settings of each group); null values are not checked.
_RANGES: list[tuple[Callable[[float], bool], str, dict[str, str]]] = [
    (
        lambda value: 0 < value < math.inf,
        "greater than 0 and finite",
        {
            "data": "num_classes image_size eval_image_size batch_size eval_batch_size repeats "
            "num_streams window_shards randaugment_ops",
            "optim": "peak_lr clipping sam_rho accumulation sam_microbatches lr_batch "
            "rsqrt_timescale",
            "trainer": "virtual_devices log_every eval_every checkpoint_every keep_checkpoints",
        },
    ),
    (  # inf: no limit, or never
        lambda value: value > 0,
        "greater than 0",
        {"data": "cache_bytes", "trainer": "keep_every_hours grace"},
    ),
    # The bound keeps the number of samples drawn in 64 bits, whatever the shards.
    (lambda value: 0 < value <= 1e6, "greater than 0 and at most 1e6", {"optim": "epochs"}),
    (math.isfinite, "finite", {"model": "head_bias"}),
    (
        lambda value: 0 <= value < 1,
        "in [0, 1)",
        {
            "model": "drop_rate drop_path_rate",
            "optim": "momentum beta2 label_smoothing ema_decay",
            "data": "max_missed",
        },
    ),
    (
        lambda value: 0 <= value < math.inf,
        "in [0, inf)",
        {"data": "workers eval_margin", "optim": "cooldown_steps weight_decay max_skipped"},
    ),
    (
        lambda value: 0 < value <= 1,
        "in (0, 1]",
        {"data": "min_crop_area", "optim": "sam_ascent_fraction"},
    ),
    # At a magnitude of 20 `Posterize` keeps 8 bits.
    (lambda value: 1 <= value <= 20, "in [1, 20]", {"data": "randaugment_magnitude"}),
]


_OF_SAM = {"sam_ascent_fraction": 1.0, "sam_microbatches": 1, "sam_adaptive": False}


def local_run_dir(run_dir: str | None) -> str | None:
    """Raises ValueError for an address (which Path turns into s3:/a): record, ledger and curves are
    appended to, which object stores do not support."""
    if run_dir is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", run_dir):
        raise ValueError(
            f"run_dir is {run_dir}, an address: give a folder that all hosts see, and "
            f"trainer.checkpoint_dir={run_dir.rstrip('/')}/checkpoints"
        )
    return run_dir


def _check_form(model: ModelConfig, trainer: TrainerConfig) -> None:
    """How the network is run (stacked, sharded, compiled), and on which device."""
    for name, value in (("model.stacked", model.stacked), ("trainer.compile", trainer.compile)):
        if value not in (True, False, "auto"):
            raise ValueError(f"{name} is {value!r}; it must be auto, true or false")
    fsdp = trainer.fsdp
    if fsdp != "auto" and not (isinstance(fsdp, int) and fsdp >= 1):
        raise ValueError(f"trainer.fsdp is {fsdp!r}; it must be auto or an integer from 1")
    if trainer.compile is True and trainer.device == "xla":
        raise ValueError(
            "trainer.compile is true with trainer.device=xla, which compiles by itself: use "
            "auto or false"
        )
    if trainer.virtual_devices is not None and trainer.device != "xla":
        raise ValueError(
            f"trainer.virtual_devices is {trainer.virtual_devices} with trainer.device="
            f"{trainer.device}; virtual devices exist only with trainer.device=xla"
        )


def _check_optim(optim: OptimConfig) -> None:
    """Settings of one optimizer, or of SAM, are given if and only if it is used."""
    own = OPTIMIZERS[optim.optimizer]
    for name in sorted({name for settings in OPTIMIZERS.values() for name in settings}):
        value = getattr(optim, name)
        if (name in own) != (value is not None):
            owners = [each for each, settings in OPTIMIZERS.items() if name in settings]
            fix = f"give {own[name]}, for example" if name in own else "give null"
            raise ValueError(
                f"optim.{name} is {value} with optim.optimizer={optim.optimizer}; "
                f"it is a setting of {' and '.join(owners)}: {fix}"
            )
    if optim.sam_rho is None:
        for name, off in _OF_SAM.items():
            value = getattr(optim, name)
            if value != off:
                raise ValueError(
                    f"optim.{name} is {value} with optim.sam_rho=null; it is an option of "
                    f"SAM: give optim.sam_rho, or {str(off).lower()}"
                )


def _one_of(key: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return found


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as "key: old -> new"."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
