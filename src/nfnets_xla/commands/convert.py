"""Rewrite weights of an NFNet as one .safetensors file, in our names, timm's or DeepMind's.

The form of SOURCE is told by its content; nothing in it is run. Every name, shape and value is
checked against the model before anything is written.
"""

from pathlib import Path

from nfnets_xla.arguments import Parser
from nfnets_xla.models.convert import TARGETS, convert_weights


def main(arguments: list[str]) -> None:
    parser = Parser(prog="nfnets-xla convert", description=__doc__)
    parser.add_argument("source", help="file of weights of any form, or its http(s) address")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", required=True, help="a name of `nfnets-xla models`")
    parser.add_argument("--to", choices=TARGETS, default="ours", help="whose names to write")
    parser.add_argument(
        "--plus-bottleneck",
        choices=("code", "paper"),
        default="code",
        help="of the + models: as released, or as printed",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    given = parser.parse_args(arguments)
    print(
        convert_weights(
            given.source,
            given.target,
            model=given.model,
            to=given.to,
            plus_bottleneck=given.plus_bottleneck,
            force=given.force,
        )
    )
