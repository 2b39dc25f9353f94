"""Draw the folders of the package and who imports whom: ``python -m docs.design.draw`` writes ``folders.svg``."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lce_trainer"
DRAWING = Path(__file__).with_name("folders.svg")

# Where each folder stands, as (column, row); who imports stands above whom it imports.
PLACES = {"pipeline": (1, 0), "synthesis": (0, 1), "training": (1, 1), "hub": (2, 1), "groups": (0, 2)}
PLACES |= {"model": (1, 2), "evaluation": (2, 2)}
WHAT = {
    "pipeline": "one YAML, stage by stage",
    "synthesis": "documents to groups",
    "training": "groups to weights",
    "hub": "cards, upload",
    "groups": "the dataset both halves know",
    "model": "what a reranker is",
    "evaluation": "rankings to figures",
}
COLUMN, ROW, WIDTH, HEIGHT, LEFT, TOP = 250, 116, 196, 52, 24, 24
_STYLE = """
  .box{fill:#eef1fb;stroke:#3f51b5;stroke-width:1.4}.name{font:600 15px sans-serif;fill:#1a237e}
  .what{font:12px sans-serif;fill:#455a64}.arrow{fill:none;stroke:#5c6bc0;stroke-width:1.6}
  .head{fill:#5c6bc0}.line{stroke:#cfd8dc}.dot{fill:#5c6bc0}.label{font:13px sans-serif;fill:#263238}
"""


def arrows() -> set[tuple[str, str]]:
    """Return every import between two folders, a folder and a base file, or two base files, once each.

    Imports inside functions and for type checking count. ``cli`` and the package's ``__init__``, which may import
    everything, are left out.
    """
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = _place(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lce_trainer":
                inner = (node.module or "").partition(".")[2]
                targets = [inner] if inner else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                targets = [name.partition(".")[2] for name in names if name.startswith("lce_trainer.")]
            found |= {
                (source, _place(target))
                for target in targets
                if (PACKAGE / _place(target)).exists() or _is_base(target)
            }
    return {(source, target) for source, target in found if source != target and source not in ("cli", "__init__")}


def draw() -> str:
    """Return the drawing as SVG: arrows between folders, and below them a dot for each base file that one imports."""
    found = arrows()
    folders = set(PLACES)
    between = sorted(arrow for arrow in found if set(arrow) <= folders)
    base = sorted({target for _, target in found if target not in folders})
    users = [*sorted(folders, key=lambda folder: (PLACES[folder][1], PLACES[folder][0])), *base]
    users = [user for user in users if any(source == user for source, target in found if target in base)]
    top = TOP + 3 * ROW + 110
    width = max(LEFT + 3 * COLUMN, 150 + 74 * len(base))
    parts = [_line(source, target) for source, target in between]
    parts += [_box(folder) for folder in PLACES]
    parts += [f'<text class="label" x="{LEFT}" y="{top - 104}">Base files, and who imports them:</text>']
    for column, name in enumerate(base):
        x = 150 + 74 * column
        parts += [f'<text class="label" transform="translate({x},{top - 14}) rotate(-40)">{name}</text>']
        parts += [f'<line class="line" x1="{x}" y1="{top - 8}" x2="{x}" y2="{top + 24 * len(users) - 10}"/>']
    for row, user in enumerate(users):
        y = top + 24 * row + 6
        parts += [f'<text class="label" x="{LEFT}" y="{y + 4}">{user}</text>']
        parts += [f'<line class="line" x1="130" y1="{y}" x2="{width - 30}" y2="{y}"/>']
        for column, name in enumerate(base):
            if (user, name) in found:
                parts += [f'<circle class="dot" cx="{150 + 74 * column}" cy="{y}" r="5"/>']
    height = top + 24 * len(users) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="Folders of lce_trainer and their {len(found)} imports">\n<style>{_STYLE}</style>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _place(module: str) -> str:
    """Return the folder of a module, or the name of a base file."""
    return module.partition(".")[0]


def _is_base(module: str) -> bool:
    return (PACKAGE / f"{_place(module)}.py").is_file()


def _centre(folder: str) -> tuple[float, float]:
    column, row = PLACES[folder]
    return LEFT + column * COLUMN + WIDTH / 2, TOP + row * ROW + HEIGHT / 2


def _box(folder: str) -> str:
    x, y = _centre(folder)
    return (
        f'<rect class="box" x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" text-anchor="middle" x="{x}" y="{y - 4}">{folder}</text>'
        f'<text class="what" text-anchor="middle" x="{x}" y="{y + 15}">{WHAT[folder]}</text>'
    )


def _line(source: str, target: str) -> str:
    (x1, y1), (x2, y2) = _centre(source), _centre(target)
    if y1 == y2:  # neighbours in a row
        side = 1 if x2 > x1 else -1
        ends = f"M{x1 + side * WIDTH / 2},{y1} L{x2 - side * WIDTH / 2},{y2}"
        return f'<path class="arrow" marker-end="url(#head)" d="{ends}"/>'
    if y2 - y1 > ROW:  # past a row of boxes: down the gap between two columns
        side = -1 if x2 < x1 else 1
        gap = x1 + side * COLUMN / 2 + (8 if x1 == x2 else -8 * side)
        x, y = x1 + side * 80, y2 - HEIGHT / 2
        end = x2 + (70 if x1 == x2 else -side * 70)
        return (
            f'<path class="arrow" marker-end="url(#head)" d="M{x},{y1 + HEIGHT / 2} C{x},{y1 + 60} {gap},{y1 + 50} '
            f'{gap},{y1 + ROW} S{end},{y - 50} {end},{y}"/>'
        )
    # Leave and arrive a little to the side of the middle, towards the other box.
    shift = max(-70.0, min(70.0, (x2 - x1) / 5))
    start, end = (x1 + shift, y1 + HEIGHT / 2), (x2 - shift, y2 - HEIGHT / 2)
    return (
        f'<path class="arrow" marker-end="url(#head)" d="M{start[0]},{start[1]} '
        f'C{start[0]},{start[1] + 30} {end[0]},{end[1] - 40} {end[0]},{end[1]}"/>'
    )


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
    print(f"{len(arrows())} arrows between folders and base files: {DRAWING.relative_to(ROOT)}")
