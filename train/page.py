"""The page a run ends with: one HTML file that opens without a network, pictures inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { width: 100%; image-rendering: auto }
figure { display: inline-block; margin: 0 0.5% 1em 0; vertical-align: top }
figcaption { color: #666; font-size: 13px }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, .left { text-align: left }
td { white-space: nowrap } td:first-child, td.left { white-space: normal }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }
"""


def picture(path: Path, caption: str, width: str = "100%") -> str:
    """HTML of a PNG file and its caption; width: of the figure, in CSS."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure style="width:{width}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(header: list[str], rows: list[list[str]], left: Collection[int] = ()) -> str:
    """HTML of a table; cells are escaped. left: columns of words beside the first, which are not aligned as numbers."""
    lines = [("th", header), *(("td", row) for row in rows)]
    kind = [' class="left"' if i in left else "" for i in range(len(header))]
    text = (
        "".join(f"<{tag}{k}>{html.escape(cell)}</{tag}>" for k, cell in zip(kind, cells, strict=True))
        for tag, cells in lines
    )
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in text) + "</table>"


def page(title: str, body: str, config: str) -> str:
    """A whole page: title, body (HTML), and the config's text at its end."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
<h2>Config</h2><pre>{html.escape(config)}</pre>
</body></html>
"""
