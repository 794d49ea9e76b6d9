"""Convert weights of an NFNet to one .safetensors file, with our names, timm's or DeepMind's.

The format of SOURCE is detected from its content, and no code in it is run. Every name, shape and
value is checked against the model before anything is written.
"""

from pathlib import Path

from nfnets_xla.arguments import Parser
from nfnets_xla.models.convert import TARGETS, convert_weights


def main(arguments: list[str]) -> None:
    parser = Parser(prog="nfnets-xla convert", description=__doc__)
    parser.add_argument("source", help="file of weights in any known format, or its http(s) URL")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", required=True, help="a name of `nfnets-xla models`")
    parser.add_argument("--to", choices=TARGETS, default="ours", help="whose names to write")
    parser.add_argument(
        "--plus-bottleneck",
        choices=("code", "paper"),
        default="code",
        help="of the + models: as in the released code, or in the paper",
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
