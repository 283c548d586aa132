"""matplotlib figures as SVG elements that live in a page: its font, its colours, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
"""Colours to draw with. They stand for the page's own, which its style sheet gives by day and by night."""
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}
_WIDTH_INCHES = 4.8
"""At this width text has about its own size on a phone; on wider screens the whole chart grows."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searched, copied, in the page's font
    "svg.hashsalt": "optc",  # the same figure gives the same file
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@contextmanager
def figure(height: float, width: float = _WIDTH_INCHES) -> Iterator[Figure]:
    """An empty figure in optc's style, ``height`` and ``width`` in inches; draw in it within the context."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def element(drawn: Figure, title: str, alt: str) -> str:
    """The figure as an ``<svg>`` element with a title and a description for screen readers.

    It has no size of its own but a ``viewBox``, no identifier that another figure in the page could have, and no
    address but those of its own parts.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    prefix = "c" + hashlib.sha256((title + buffer.getvalue()).encode()).hexdigest()[:8]
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    _isolate(root, prefix)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-alt"}
    for position, (tag, text) in enumerate((("title", title), ("desc", alt))):
        made = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{prefix}-{'title' if tag == 'title' else 'alt'}"})
        made.text = text
        root.insert(position, made)
    return _as_html(root)


def _isolate(root: ET.Element, prefix: str) -> None:
    """Drop identifiers that nothing refers to and give the others a prefix; the page's colours and font."""
    link = f"{{{_LINK}}}href"
    used = {each.attrib[link].removeprefix("#") for each in root.iter() if link in each.attrib}
    for each in root.iter():
        used.update(name for value in each.attrib.values() for name in _REFERENCE.findall(value))
    for each in root.iter():
        if each.attrib.get("id") in used:
            each.attrib["id"] = f"{prefix}-{each.attrib['id']}"
        else:
            each.attrib.pop("id", None)
        if link in each.attrib:
            each.attrib["href"] = f"#{prefix}-{each.attrib.pop(link).removeprefix('#')}"
        for name, value in each.attrib.items():
            value = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, f"var({variable})")
            each.attrib[name] = value
        if "style" in each.attrib:
            each.attrib["style"] = re.sub(r"font: ([\w. ]*?)(\d[\d.]*px) [^;]*", r"font-size: \2", each.attrib["style"])


def _as_html(root: ET.Element) -> str:
    """The element without namespaces, which HTML does not need and which would be the only addresses in the page."""
    for each in root.iter():
        each.tag = str(each.tag).rpartition("}")[2]
        each.attrib = {name.rpartition("}")[2]: value for name, value in each.attrib.items()}
    styles = [child for child in root.iter("defs") for _ in child.findall("style")]
    for child in styles:
        for style in child.findall("style"):
            child.remove(style)
            root.attrib["style"] = "stroke-linejoin: round; stroke-linecap: butt"
    return ET.tostring(root, encoding="unicode")
