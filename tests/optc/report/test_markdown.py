from __future__ import annotations

import re

from optc.report.document import Chart, Document, Section, Table
from optc.report.markdown import markdown


def test_markdown_says_what_the_charts_show(document: Document) -> None:
    text = markdown(document)
    for section in document.sections:
        assert f"\n## {section.title}" in text
        for part in section.parts:
            if isinstance(part, Chart):
                assert re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", part.alt) in text
    assert "<svg" not in text


def test_rows_of_a_table_have_as_many_cells_as_its_header(document: Document) -> None:
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", markdown(document), flags=re.MULTILINE)
    assert blocks
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block


def test_what_markdown_would_read_as_markup_is_escaped() -> None:
    table = Table("t", ("a|b", "n"), (("<b>*x*</b>", "1"), ("y\nz", "2")), (1,), strong=1)
    text = markdown(Document("d", "v", None, ("_s_",), (Section("s", (table,)),), "made"))
    assert "| a\\|b | n |\n| --- | ---: |\n| \\<b\\>\\*x\\*\\</b\\> | 1 |\n| **y z** | **2** |" in text
    assert "- \\_s\\_" in text
