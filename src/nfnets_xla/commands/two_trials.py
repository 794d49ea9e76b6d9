"""Sweep the learning rate by arXiv 2310.16764's rule of two trials.

Assumes that the best rate never rises with epochs or model size. Each model is run twice at each
number of epochs: with the lowest of the rates that were best for runs no larger and no longer, and
with half of it. If such a run diverged at all its rates, the higher rate is at most half the lowest
of these. Small models and few epochs come first, since the others start from their rates.
"""

from nfnets_xla import compose
from nfnets_xla.arguments import Parser
from nfnets_xla.preempt import Preemption


def main(arguments: list[str], preemption: Preemption) -> None:
    parser = Parser(prog="nfnets-xla two_trials", description=__doc__)
    parser.add_argument("recipe", help="a recipe that sweeps: lr_sweep, scaling_sweep")
    parser.add_settings()
    given = parser.parse_intermixed_args(arguments)
    compose.two_trials(given.recipe, given.overrides, preemption, given.config_dir)
