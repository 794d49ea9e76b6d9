"""Prints the text of a release, from its tag: `python .github/release.py v0.1.0 > notes.md`.

A tag is "v" and the version in version.py. The text is the section of CHANGELOG.md for that
version, under the heading `## 0.1.0 (2026-12-01)`. Nothing under "Unreleased" can be released.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r'^__version__ = "(\d+\.\d+\.\d+)"$', re.MULTILINE)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def version(text: str) -> str:
    """The version in version.py's text. ValueError unless it is three numbers."""
    found = VERSION.search(text)
    if found is None:
        raise ValueError('version.py has no line __version__ = "X.Y.Z"')
    return found[1]


def sections(changelog: str) -> dict[str, str]:
    """{"Unreleased" or "X.Y.Z (date)": its text}, in the file's order."""
    _, *parts = HEADING.split(changelog)
    return dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))


def notes(tag: str, changelog: str, current: str) -> str:
    """The changelog's text for `tag`. ValueError if tag, version and changelog do not agree."""
    if tag != f"v{current}":
        raise ValueError(f"the tag is {tag!r} and version.py says {current}: tag it v{current}")
    texts = sections(changelog)
    if texts.get("Unreleased"):
        raise ValueError("CHANGELOG.md has an Unreleased section: give it the version and the date")
    for heading, text in texts.items():
        if re.fullmatch(rf"{re.escape(current)} \(\d{{4}}-\d\d-\d\d\)", heading) and text:
            return text
    raise ValueError(f"CHANGELOG.md has no section '## {current} (YEAR-MONTH-DAY)' with a text")


if __name__ == "__main__":
    current = version((ROOT / "src/nfnets_xla/version.py").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        print(notes(sys.argv[1], changelog, current))
    except ValueError as error:
        sys.exit(f"release.py: {error}")
