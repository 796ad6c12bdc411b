"""Renews what README.md, docs/recipes.md and the recipes say of a rehearsal: `python -m distilled_t5.devtools.docs.recipe_tables`.

Followed by names, it rehearses these recipes alone, half a minute each; with .dev/python on PYTHONPATH.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from ...config.files import SHIPPED
from ..comfyui.in_process import ROOT, start_comfyui

README, PAGE = ROOT / "README.md", ROOT / "docs" / "recipes.md"
ROW = re.compile(r"^\| `([\w-]+)` \| (\d.*) \|$", re.MULTILINE)
# The README shows neither recipes of the miniature nor the other sizes of the paper's student.
LEFT_OUT = re.compile(r"smoke.*|miniature-.*|flux-dev-(small|large|xl)")
HEAD = "| Recipe | GPU memory, with offloading | RAM | RTX 4090 "
COMMENT = re.compile(r"[\d.,]+ GB of GPU memory at the peak,.*?on one RTX 4090 at 40% of its peak [\w ,]+ hours", re.DOTALL)


def rows_of(page: str) -> dict[str, str]:
    """The rows of docs/recipes.md by recipe: peak, offloaded, teacher, RAM, operations, hours on an RTX 4090 and on an H100."""
    return dict(ROW.findall(page))


def with_rows(page: str, rows: Mapping[str, str]) -> str:
    """The page with these rows in the table."""
    first, *_, last = ROW.finditer(page)
    return page[: first.start()] + "\n".join(f"| `{name}` | {rows[name]} |" for name in sorted(rows)) + page[last.end() :]


def compact(rows: Mapping[str, str]) -> str:
    """The README's table: two recipes a line, the shortest runs first."""
    cells = {name: row.split(" | ") for name, row in rows.items() if not LEFT_OUT.fullmatch(name)}
    names = sorted(cells, key=lambda name: float(cells[name][5].replace(",", "").removeprefix("under ")))
    shown = [f"| `{name}` | {cells[name][0]}, {cells[name][1]} | {cells[name][3]} | {cells[name][5]} h " for name in names]
    lines = [HEAD * 2 + "|", "|---" * 8 + "|"]
    return "\n".join([*lines, *("".join(shown[place : place + 2]) + "|" for place in range(0, len(shown), 2))])


def with_table(readme: str, rows: Mapping[str, str]) -> str:
    """The README with this table in the place of the one it has."""
    return re.sub(rf"^{re.escape(HEAD)}.*(\n\|.*)*", lambda _: compact(rows), readme, count=1, flags=re.MULTILINE)


def comment(row: str) -> str:
    """What a recipe says of its rehearsal."""
    peak, offloaded, _teacher, ram, operations, hours, _on_h100 = row.split(" | ")
    return (
        f"{peak} of GPU memory at the peak, {offloaded} with the diffusion model in RAM; {ram} of RAM;\n"
        f"# {operations} in all, on one RTX 4090 at 40% of its peak {hours} hours"
    )


def main() -> None:
    """Rehearse and write."""
    start_comfyui("--use-pytorch-cross-attention")
    from ...train.rehearsal_report import recipe_row

    names = sys.argv[1:] or [path.stem for path in SHIPPED.glob("*.toml")]
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    for name in names:
        rows |= rows_of(recipe_row(name))
        print(f"{name}: {rows[name]}", flush=True)
    written = {PAGE: with_rows(PAGE.read_text(encoding="utf-8"), rows), README: with_table(README.read_text(encoding="utf-8"), rows)}
    recipes = [SHIPPED / f"{name}.toml" for name in names]
    written |= {path: COMMENT.sub(comment(rows[path.stem]), path.read_text(encoding="utf-8")) for path in recipes}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
