from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optc.report.document import Chart, Code, Document, Section, Table
from optc.report.page import page

VOID = {"meta", "br", "hr", "img", "link", "input"}
UNITS = re.compile(r"\((ms|MB|number of operators|ms\), size \(MB\)|billion operations/s against operations/byte)")


class Parsed(HTMLParser):
    """A page as (tag, attributes) in order, and the text by the tag it stands in; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(document: Document) -> str:
    return page(document)


def test_the_page_needs_nothing_else(html: str) -> None:
    parsed = Parsed(html)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith("#")
            assert not re.search(r"url\((?!#)", value or "")
            assert "://" not in (value or "")
    style = "".join(parsed.text["style"])
    assert "@import" not in style
    assert "url(" not in style


def test_identifiers_are_unique_and_references_resolve(html: str) -> None:
    parsed = Parsed(html)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, a in parsed.tags for name, value in a.items() if name == "href" and value}
    targets |= set(re.findall(r"url\(#([^)]+)\)", html))
    targets |= {each for a in parsed.all("svg") for each in str(a["aria-labelledby"]).split()}
    assert targets <= set(ids)


def test_every_chart_has_a_title_units_and_a_description(document: Document, html: str) -> None:
    charts = [part for section in document.sections for part in section.parts if isinstance(part, Chart)]
    assert [chart.title.partition(" (")[0].partition(" of ")[0] for chart in charts] == [
        "How long queries took",
        "Latency",
        "Roofline",
        "Time by layer",
        "Most memory while answering",
        "The graph, pass by pass",
        "Its weights, pass by pass",
    ]
    parsed = Parsed(html)
    assert len(parsed.all("svg")) == len(charts)
    assert all(attributes["role"] == "img" for attributes in parsed.all("svg"))
    assert parsed.text["desc"] == [chart.alt for chart in charts]
    for chart in charts:
        assert UNITS.search(chart.title), chart.title
        assert len(chart.alt) > 30
        assert re.search(r"\d", chart.alt)
        assert chart.title in parsed.text["title"]


def test_charts_use_the_pages_colours_and_both_themes_define_them(html: str) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert {"--ink", "--grid", "--series-1", "--series-2"} <= used
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark, paper = (style.split(":root {")[index].partition("}")[0] for index in (1, 2, 3))
    for theme in (light, dark, paper):
        assert used <= set(re.findall(r"(--[\w-]+):", theme))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke|color)[:=]\W*#[0-9a-f]{3,6}", drawn) == []


def test_what_models_and_errors_say_is_text_and_not_markup(html: str) -> None:
    assert "<b>not</b>" not in html
    assert "it does &lt;b&gt;not&lt;/b&gt; open" in html
    assert "net &lt;int8&gt;" in html
    hostile = Document("<script>alert(1)</script>", "v", None, (), (Section("s", (Code("c", ("</pre><script>",)),)),))
    assert "<script" not in page(hostile)


def test_the_same_document_is_the_same_page(document: Document, html: str) -> None:
    assert page(document) == html


@pytest.mark.parametrize(("good", "css"), [(True, "verdict good"), (False, "verdict bad"), (None, "verdict")])
def test_the_verdict_is_coloured_by_what_it_says(document: Document, good: bool | None, css: str) -> None:
    assert f'<p class="{css}">' in page(replace(document, good=good))


def test_tables_are_rectangular(document: Document) -> None:
    tables = [part for section in document.sections for part in section.parts if isinstance(part, Table)]
    assert tables
    for table in tables:
        assert {len(row) for row in table.rows} <= {len(table.header)}, table.title
        assert all(column < len(table.header) for column in table.numbers)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to render with: apt install chromium")


def chromium(tmp_path: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@browser
def test_a_browser_shows_it_dark_and_light(html: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html)
    means = {}
    for theme, setting in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{theme}.png"
        chromium(
            tmp_path,
            f"--blink-settings=preferredColorScheme={setting}",
            "--window-size=1000,1600",
            f"--screenshot={picture}",
            (tmp_path / "report.html").as_uri(),
        )
        pixels = np.asarray(Image.open(picture).convert("L"), dtype=np.float64)
        assert len(np.unique(pixels)) > 20  # text, charts and shades, not an empty page
        means[theme] = pixels.mean()
    assert means["dark"] < 80 < 180 < means["light"]


@browser
def test_a_phone_need_not_scroll_sideways(html: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html)
    frame = (
        '<body><iframe src="report.html" style="width:390px;height:800px" onload="const d=this.contentDocument;'
        "document.title=[...d.querySelectorAll('svg')].map(s=>s.getBoundingClientRect().width|0).join()"
        "+'|'+d.documentElement.scrollWidth+'|'+d.documentElement.clientWidth\"></iframe></body>"
    )
    (tmp_path / "phone.html").write_text(frame)
    dom = chromium(tmp_path, "--dump-dom", (tmp_path / "phone.html").as_uri())
    found = re.search(r"<title>([\d,]+)\|(\d+)\|(\d+)</title>", dom)
    assert found, dom[:300]
    charts, needed, there = found.groups()
    assert int(needed) <= int(there)
    assert min(map(int, charts.split(","))) > 250
