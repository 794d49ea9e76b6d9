"""What is published about trained NFNets: accuracies, and which weights exist.

Nobody has published weights of F7, of a "+" model, or of anything pre-trained on JFT.
"""

from dataclasses import dataclass

TAG = "dm_in1k"  # DeepMind's weights, trained on ImageNet from scratch
HAIKU_TAG = "dm_in1k_haiku"  # the same, as DeepMind published them


@dataclass(frozen=True)
class Accuracy:
    """Per cent of ImageNet's validation set, at the variant's test size."""

    top1: float
    top5: float
    remark: str = ""


# arXiv 2102.06171, Table 3. The released weights of F6 are those trained with SAM.
IMAGENET: dict[str, Accuracy] = {
    "nfnet_f0": Accuracy(83.6, 96.8),
    "nfnet_f1": Accuracy(84.7, 97.1),
    "nfnet_f2": Accuracy(85.1, 97.3),
    "nfnet_f3": Accuracy(85.7, 97.5),
    "nfnet_f4": Accuracy(85.9, 97.6),
    "nfnet_f5": Accuracy(86.0, 97.6, "86.3 and 97.9 with SAM"),
    "nfnet_f6": Accuracy(86.5, 97.9, "with SAM"),
}

# timm's evaluation of DeepMind's weights in its dm_nfnet_*, at the test size (results-imagenet).
TIMM_TOP1: dict[str, float] = {
    "nfnet_f0": 83.47,
    "nfnet_f1": 84.70,
    "nfnet_f2": 85.18,
    "nfnet_f3": 85.68,
    "nfnet_f4": 85.84,
    "nfnet_f5": 86.10,
    "nfnet_f6": 86.36,
}

# After pre-training on JFT: arXiv 2102.06171, Table 5, and arXiv 2310.16764. Weights unpublished.
TRANSFERRED: dict[str, str] = {
    "nfnet_f4": "89.2 top-1 after JFT-300M",
    "nfnet_f4_plus": "89.2 top-1 after JFT-300M (arXiv 2102.06171, Table 5)",
    "nfnet_f7_plus": "90.3 top-1 after 8 epochs of JFT-4B, 90.4 with repeated augmentation",
}
