"""Parsing of command-line arguments: argparse with wrapped help and one-line errors."""

import argparse
import inspect
import re
import textwrap
from typing import Any, NoReturn


class Paragraphs(argparse.HelpFormatter):
    """Wraps paragraphs, but not indented lines (examples), and appends the default values."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
        return "\n\n".join(
            paragraph
            if paragraph.startswith("    ")
            else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if not action.option_strings or not isinstance(default, (str, int, float)):
            return said
        if isinstance(default, bool) or default == argparse.SUPPRESS:
            return said
        return f"{said} (default: %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong arguments, which the command line prints in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Paragraphs, **options)

    def error(self, message: str) -> NoReturn:
        message = message.removesuffix(", key=value")  # argparse names it though it is optional
        raise ValueError(f"{message} (see {self.prog} --help)")

    def add_settings(self) -> None:
        """Adds overrides of a recipe's settings, and the folder of the user's own recipes."""
        self.add_argument(
            "overrides", nargs="*", metavar="key=value", help="override a setting of the recipe"
        )
        self.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes")


def quoted(text: str) -> str:
    """`text` quoted for Hydra: quotes, and backslashes before quotes, are escaped."""
    doubled = re.sub(r'\\+(?="|$)', lambda run: 2 * run[0], text)
    return '"' + doubled.replace('"', r"\"") + '"'
