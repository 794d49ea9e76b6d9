"""How often a law fitted to a frontier is accepted, by its interval alone and by the rule of
`scaling`: python benchmarks/frontier.py

Simulates studies with the paper's models and numbers of epochs (arXiv 2310.16764, figures 2 and 3).
The losses are either noise, whose frontier falls by construction, or a power law with scatter about
it. Takes a minute or two of one core.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from _turns import Report
from nfnets_xla.scaling.account import macs_per_image, train_flops
from nfnets_xla.scaling.law import Law, fit_frontier
from nfnets_xla.scaling.published import JFT_IMAGES, PAPER_EPOCHS, PAPER_MODELS, TRAIN_SIZE

STUDIES, NOISE, EXPONENT, SCATTERS = 400, 0.05, 0.05, (0.01, 0.03)


def main() -> None:
    report = Report(
        "frontier",
        f"python benchmarks/frontier.py: {STUDIES} studies of {len(PAPER_MODELS)} models at "
        f"{len(PAPER_EPOCHS)} numbers of epochs each; shares of those with 3 runs on the frontier",
    )
    flops = np.array(
        [
            train_flops(macs_per_image(name, TRAIN_SIZE), epochs * JFT_IMAGES)
            for name in PAPER_MODELS
            for epochs in PAPER_EPOCHS
        ]
    )
    rng = np.random.default_rng(0)
    laws = studies(flops, np.zeros_like(flops), NOISE, rng)
    report.say(
        f"noise of {NOISE:.0%}: interval without 0 {share(laws, excludes_0):.1%}, resolved "
        f"{share(laws, resolved):.1%}"
    )
    for scatter in SCATTERS:
        laws = studies(flops, -EXPONENT * np.log(flops), scatter, rng)
        report.say(
            f"b = {EXPONENT:g}, runs scatter by {scatter:.0%}: interval holds b "
            f"{share(laws, holds_b):.1%}, resolved {share(laws, resolved):.1%}"
        )
    report.save()


def studies(
    flops: np.ndarray, log_loss: np.ndarray, scatter: float, rng: np.random.Generator
) -> list[Law]:
    laws = []
    for _ in range(STUDIES):
        losses = np.exp(log_loss + scatter * rng.standard_normal(len(flops)))
        with suppress(ValueError):  # fewer than three runs on the frontier
            laws.append(fit_frontier("power", flops, losses))
    return laws


def share(laws: Sequence[Law], holds: Callable[[Law], bool]) -> float:
    return sum(map(holds, laws)) / len(laws)


def resolved(law: Law) -> bool:
    return law.resolved("b")


def excludes_0(law: Law) -> bool:
    low, high = law.intervals["b"]
    return low > 0 or high < 0


def holds_b(law: Law) -> bool:
    low, high = law.intervals["b"]
    return low < EXPONENT < high


if __name__ == "__main__":
    main()
