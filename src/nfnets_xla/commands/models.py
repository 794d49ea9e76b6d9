"""List models with parameters and cost, or say all about those that are named in full."""

from nfnets_xla.arguments import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(prog="nfnets-xla models", description=__doc__)
    parser.add_argument("pattern", nargs="*", help="a name, or part of several: nfnet_f7*")
    patterns = parser.parse_args(arguments).pattern
    from nfnets_xla.models.registry import card, full_card, list_models

    for pattern in patterns or ["*"]:
        names = list_models(pattern)
        if not names:
            near = list_models(f"*{pattern.strip('*')}*")
            meant = f"there are {', '.join(near)}" if near else "see nfnets-xla models"
            raise ValueError(f"no model matches {pattern!r}: {meant}")
        for name in names:
            print(full_card(name) if names == [pattern] else card(name))
