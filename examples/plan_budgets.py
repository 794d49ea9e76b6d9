"""What to train with a budget: from F0 for a third of an epoch to F7+ for eight.

    python examples/plan_budgets.py [PRICE OF A CHIP-HOUR]        (loads no torch)

The hours printed are those of one trial on 512 cores. The rules are arXiv 2310.16764's;
`make_plan(job, read_points(RUNS)[0])` fits your own runs instead.
"""

import sys

from nfnets_xla.scaling import account
from nfnets_xla.scaling.plan import Job, make_plan

BUDGETS = (400, 1_600, 5_000, 20_000, 110_000)  # TPU-v4 core-hours


def main() -> None:
    try:
        price = float(sys.argv[1]) if len(sys.argv) > 1 else None
    except ValueError:
        sys.exit(f"the price is {sys.argv[1]!r}; it must be a number")
    print(f"{'core-hours':>10}  {'model':14}{'epochs':>7}{'rates to try':>16}{'hours':>7}  cost")
    for core_hours in BUDGETS:
        job = Job(core_hours=core_hours)
        plan = make_plan(job)
        rates = " and ".join(f"{rate:g}" for rate in plan.trials.rates)
        cost = (
            "" if price is None else f"{account.cost(core_hours, job.hardware, price=price):,.0f}"
        )
        print(
            f"{core_hours:>10,}  {plan.model:14}{plan.epochs:>7.2f}{rates:>16}"
            f"{plan.wall_hours:>7.1f}  {cost}"
        )


if __name__ == "__main__":
    main()
