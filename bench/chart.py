"""The chart of orders per second, as an SVG that is readable on light and on dark pages."""

from collections.abc import Sequence
from html import escape

WIDTH = 720
LABEL_WIDTH = 250
VALUE_WIDTH = 80
BAR_HEIGHT = 26
STEP = 38
TOP = 44

_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">
  <style>
    text {{ font: 14px system-ui, sans-serif; fill: #24292f }}
    .title {{ font-weight: 600 }}
    .theirs {{ fill: #8c959f }}
    .ours {{ fill: #1f6feb }}
    @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .theirs {{ fill: #6e7681 }} }}
  </style>
  <text class="title" x="0" y="20">{title}</text>
"""
_BAR = """\
  <text x="0" y="{text_y}">{label}</text>
  <rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>
  <text x="{value_x}" y="{text_y}">{value:,.0f}</text>
"""


def bars(title: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    """A bar for each row: its label, its value, and whether it is ours."""
    highest = max((value for _, value, _ in rows), default=1.0)
    parts = [_HEAD.format(width=WIDTH, height=TOP + STEP * len(rows), title=escape(title))]
    for number, (label, value, is_ours) in enumerate(rows):
        width = round(value / highest * (WIDTH - LABEL_WIDTH - VALUE_WIDTH), 1)
        y = TOP + STEP * number
        parts.append(
            _BAR.format(
                label=escape(label),
                kind="ours" if is_ours else "theirs",
                x=LABEL_WIDTH,
                y=y,
                width=width,
                height=BAR_HEIGHT,
                text_y=y + 18,
                value_x=LABEL_WIDTH + width + 8,
                value=value,
            )
        )
    return "".join(parts) + "</svg>\n"
