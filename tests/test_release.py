"""Version, changelog and tag agree; a release's text is its section of the changelog."""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import pytest

import nfnets_xla

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
assert spec is not None
assert spec.loader is not None
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

CHANGELOG = """# Changelog

## 0.2.0 (2026-12-01)

### Fixed
- A thing.

## 0.1.0 (2026-11-01)

- All.
"""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_versions_in_the_changelog_fall_from_the_present_one() -> None:
    current = release.version((ROOT / "src/nfnets_xla/version.py").read_text(encoding="utf-8"))
    assert current == nfnets_xla.__version__
    headings = list(release.sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    assert headings.count("Unreleased") <= 1
    assert "Unreleased" not in headings[1:]
    dated = [heading for heading in headings if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in dated)
    released = [numbers(heading.split()[0]) for heading in dated]
    assert all(newer > older for newer, older in pairwise([numbers(current), *released[1:]]))
    assert not released or released[0] <= numbers(current)


def test_a_release_says_what_the_changelog_says() -> None:
    assert release.notes("v0.2.0", CHANGELOG, "0.2.0") == "### Fixed\n- A thing."
    assert release.notes("v0.1.0", CHANGELOG, "0.1.0") == "- All."


@pytest.mark.parametrize(
    ("tag", "changelog", "current", "says"),
    [
        ("0.2.0", CHANGELOG, "0.2.0", "tag it v0.2.0"),
        ("v0.2.0", CHANGELOG, "0.1.0", "tag it v0.1.0"),
        ("v0.3.0", CHANGELOG, "0.3.0", "no section '## 0.3.0"),
        ("v0.2.0", CHANGELOG.replace("- A thing.", "").replace("### Fixed", ""), "0.2.0", "no sec"),
        ("v0.2.0", CHANGELOG.replace(" (2026-12-01)", ""), "0.2.0", "no section"),
        ("v0.1.0", CHANGELOG.replace("0.2.0 (2026-12-01)", "Unreleased"), "0.1.0", "Unreleased"),
    ],
)
def test_a_release_that_does_not_agree_is_refused(
    tag: str, changelog: str, current: str, says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        release.notes(tag, changelog, current)
