"""Prove from the ledger of a run that every sample was shown exactly once, over all starts.

Exit code 1 if one was missed or repeated. Steps that a restart computed again count once.
"""

from pathlib import Path

from nfnets_xla.arguments import Parser
from nfnets_xla.ledger import audit


def main(arguments: list[str]) -> int:
    parser = Parser(prog="nfnets-xla audit", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with trainer.ledger=true")
    found = audit(parser.parse_args(arguments).run)
    print("\n".join(found.report()))
    return 1 if found.faults else 0
