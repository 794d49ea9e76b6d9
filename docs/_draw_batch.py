"""Draws docs/batch.svg from the code: python docs/_draw_batch.py

Boxes are modules, with the first line of what each says of itself; an arrow goes from a module to
one that it imports. Only the rows below are chosen by hand: where on the way of a batch a module
stands. tests/test_docs.py compares the picture with the code.
"""

import ast
import textwrap
from html import escape
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "nfnets_xla"
PICTURE = Path(__file__).with_name("batch.svg")
ROWS = {
    "which samples": ["data/order"],
    "bytes": ["data/shards", "data/storage", "data/remote", "data/cache"],
    "pixels": ["data/decode", "data/augment", "data/randaugment", "data/masks"],
    "a global batch": ["data/batches", "data/loader", "data/mix"],
    "on the devices": ["strategy", "xla", "backend"],
    "the step": ["task", "losses", "models/nfnet", "optim/sam", "optim/sgd_agc", "optim/ema"],
    "what is kept": [
        "callbacks/monitor",
        "record",
        "ledger",
        "callbacks/checkpointer",
        "checkpoint",
    ],
}
LEFT, WIDTH, HEIGHT, GAP_X, GAP_Y = 120, 190, 76, 14, 40


def main() -> None:
    PICTURE.write_text(picture())


def picture() -> str:
    places = {
        module: (LEFT + column * (WIDTH + GAP_X), 20 + row * (HEIGHT + GAP_Y))
        for row, modules in enumerate(ROWS.values())
        for column, module in enumerate(modules)
    }
    width = max(x for x, _ in places.values()) + WIDTH + 20
    height = max(y for _, y in places.values()) + HEIGHT + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#4060a0"/></marker></defs>',
    ]
    parts += [arrow(places[a], places[b]) for a in places for b in sorted(imports(a) & {*places})]
    for number, title in enumerate(ROWS):
        y = 20 + number * (HEIGHT + GAP_Y) + HEIGHT / 2
        parts.append(f'<text x="8" y="{y}" font-size="12" font-weight="bold">{title}</text>')
    parts += [box(module, *place) for module, place in places.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def box(module: str, x: float, y: float) -> str:
    purpose = (ast.get_docstring(tree(module)) or "").split("\n")[0]
    lines = textwrap.wrap(purpose, 29)[:4]
    text = [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#f4f6fb" '
        'stroke="#4060a0"/>',
        f'<text x="{x + 8}" y="{y + 16}" font-size="12" font-weight="bold">{module}.py</text>',
    ]
    for number, line in enumerate(lines):
        text.append(
            f'<text x="{x + 8}" y="{y + 31 + 12 * number}" font-size="9.5">{escape(line)}</text>'
        )
    return "".join(text)


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From a box's edge to another's; a curve around what lies between two of one row."""
    (x1, y1), (x2, y2) = start, end
    style = 'fill="none" stroke="#4060a0" stroke-opacity="0.6" marker-end="url(#head)"'
    middle = WIDTH / 2
    if y1 == y2:
        lift = 12 + abs(x2 - x1) / 20
        return (
            f'<path d="M{x1 + middle},{y1} C{x1 + middle},{y1 - lift} {x2 + middle},{y2 - lift} '
            f'{x2 + middle},{y2}" {style}/>'
        )
    y1, y2 = (y1 + HEIGHT, y2) if y2 > y1 else (y1, y2 + HEIGHT)
    half = (y1 + y2) / 2
    return (
        f'<path d="M{x1 + middle},{y1} C{x1 + middle},{half} {x2 + middle},{half} '
        f'{x2 + middle},{y2}" {style}/>'
    )


def imports(module: str) -> set[str]:
    """Modules of ours that `module` imports, anywhere in it, named like ROWS' members."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nfnets_xla"):
            base = (node.module or "").split(".")[1:]
            found |= {"/".join(base), *("/".join([*base, alias.name]) for alias in node.names)}
    return found


def tree(module: str) -> ast.Module:
    return ast.parse((SRC / f"{module}.py").read_text())


if __name__ == "__main__":
    main()
