"""The numbers that the papers print, each with its source.

Sources: CM is arXiv 2310.16764 (the paper reproduced here), NF 2102.06171, ZH 2106.04560,
SV 2305.13035. None means that a number was not published; nothing was read off a figure.
"""

from dataclasses import dataclass

JFT_IMAGES = 4_000_000_000  # CM section 2: "about 4 billion" of JFT-4B
BATCH = 4096  # CM section 2
TRAIN_SIZE = 224  # pixels, CM section 2
PEAK_LR = 1.6  # CM section 2 and Figure 3: the optimum of all models at small epoch budgets
FINETUNE_EPOCHS, FINETUNE_SIZE = 50, 384  # CM section 3; on ImageNet's 1,281,167 images

# CM Figure 2's models, in their order of size. F4 to F6 were not used.
PAPER_MODELS = (
    "nfnet_f0",
    "nfnet_f1",
    "nfnet_f3",
    "nfnet_f3_plus",
    "nfnet_f7",
    "nfnet_f7_plus",
)
PAPER_EPOCHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # CM Figure 3's axis
# CM section 2: from about here on the optimum is above one epoch; size and epochs should grow at
# the same rate.
ONE_EPOCH_CORE_HOURS = 5_000.0


@dataclass(frozen=True)
class Peer:
    """A model of another paper with which Figure 1 compares the NFNets."""

    name: str
    gflops: float  # forward, one image of 224 px, 2 per MAC, as ZH and SV print them
    rows: float | None  # images seen in pre-training, with repeats
    top1: float  # ImageNet, %, fine-tuned
    finetune_size: int  # pixels, in fine-tuning
    v3_core_hours: float  # as reported by its authors; of G/14 "more than"
    v4_core_hours: float  # CM section 3: estimated from speeds that CM's authors measured
    source: str


# ZH Table 2 and appendices D, F; SV Table 1 and section 5; v4 from CM section 3.
VITS = (
    Peer("ViT-g/14", 533.1, 16e9, 90.2, 518, 210e3, 120e3, "ZH"),
    Peer("ViT-G/14", 965.3, 5e6 * 4096, 90.45, 518, 500e3, 280e3, "ZH"),
    Peer("SoViT-400m/14", 221.0, 40e9, 90.3, 518, 230e3, 130e3, "SV"),
)


@dataclass(frozen=True)
class Run:
    """One run of CM whose cost is printed."""

    model: str
    epochs: float
    v4_core_hours: float
    top1: float | None  # ImageNet, %, fine-tuned
    note: str


RUNS = (
    # CM section 2 prints the range 0.4k to 110k; that its ends are these two is derived: they are
    # the smallest and the largest run, and give 29 % and 36 % MFU.
    Run("nfnet_f0", 0.25, 0.4e3, None, "smallest run of Figure 2"),
    Run("nfnet_f7_plus", 8, 110e3, 90.3, "largest run"),
    Run("nfnet_f7_plus", 8, 110e3, 90.4, "largest run, fine-tuned with 4 views of each image"),
)
FINETUNE_V4_CORE_HOURS = 1.6e3  # of F7+, CM section 3
PAPER_MFU = 0.36  # derived: F7+, 8 epochs of 4e9 images of 224 px, in 110k v4 core-hours
