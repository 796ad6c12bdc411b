"""Pages of one file, with their style, script and data: what they share is written into each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = Path(__file__).resolve().parent / "page_head.html"
PLACE = ">DATA<"


def page_template(path: Path) -> str:
    """A page without its data: the shared beginning, then the page's own file."""
    return HEAD.read_text(encoding="utf-8") + path.read_text(encoding="utf-8")


def filled(template: str, data: Any) -> str:
    """The page with its data. No text in the data can end the element that holds them."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return template.replace(PLACE, f">{text}<")
