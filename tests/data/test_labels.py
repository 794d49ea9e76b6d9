"""A label is a number, or several with weights; it is read back as written, or refused."""

import pytest

from nfnets_xla.data.labels import checked, parse, to_text

GOOD = [
    ("cls", b"3\n", {3: 1.0}),
    ("txt", b" 3 7 ", {3: 1.0, 7: 1.0}),
    ("txt", b"7:0.25, 3:0.75", {7: 0.25, 3: 0.75}),
    ("txt", b"7:2,3", {7: 2.0, 3: 1.0}),
    ("json", b'{"label": 3, "other": null}', {3: 1.0}),
    ("json", b'{"label": [3, 7]}', {3: 1.0, 7: 1.0}),
    ("json", b'{"label": [3, 7], "weight": [0.8, 2]}', {3: 0.8, 7: 2.0}),
]
BAD = [
    *[("cls", text) for text in (b"", b"cat", b"-1", b"1_0", b"1.0", b"2147483648", b"1" * 99)],
    *[("txt", text) for text in (b"3 3", b"3:0", b"3:", b":1", b"3:-1", b"3:nan", b"3:1e5")],
    *[("txt", text) for text in (b" ".join(b"%d" % n for n in range(65)), b"3" + b" " * 2**16)],
    *[("json", text) for text in (b"3", b"[3]", b"{}", b'{"label": 3.0}', b'{"label": true}')],
    *[("json", text) for text in (b'{"label": []}', b'{"label": ["3"]}', b"\xff", b"[" * 9999)],
    *[("json", b'{"label": [3, 7], "weight": ' + text) for text in (b"[1]}", b'"ab"}', b"[1, 0]}")],
    *[("json", b'{"label": 3, "weight": ' + text) for text in (b"[NaN]}", b"[true]}", b"null}")],
]


@pytest.mark.parametrize(("kind", "text", "labels"), GOOD)
def test_forms(kind: str, text: bytes, labels: dict[int, float]) -> None:
    assert parse(kind, text) == labels
    assert list(parse(kind, text) or {}) == list(labels)


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_anything_else_is_refused(kind: str, text: bytes) -> None:
    assert parse(kind, text) is None


@pytest.mark.parametrize("labels", [{3: 1.0}, {3: 0.5}, {3: 1.0, 7: 1.0}, {7: 0.2, 3: 0.8}])
def test_what_is_written_comes_back(labels: dict[int, float]) -> None:
    kind, text = to_text(checked(list(labels), list(labels.values())))
    assert parse(kind, text) == labels
    assert (kind == "cls") == (labels == {3: 1.0})
