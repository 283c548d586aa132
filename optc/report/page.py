"""A document as one HTML page that needs nothing else: style, charts and all are inside."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from optc.report.document import Chart, Code, Document, Table

if TYPE_CHECKING:
    from jinja2 import Template


def page(document: Document) -> str:
    """The document as HTML: no script, no address outside of itself, light and dark, for phone, screen and paper."""
    return _template().render(document=document, kind=_kind)


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("optc.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _kind(part: str | Chart | Table | Code) -> str:
    return {Chart: "chart", Table: "table", Code: "code"}.get(type(part), "text")
