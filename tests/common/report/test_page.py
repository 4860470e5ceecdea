"""A page escapes every name, holds no script and loads nothing; a figure is text in the page's colours."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from common.report.figures import (
    Estimated,
    Figure,
    Frequency,
    Series,
    draw_calibration,
    draw_estimates,
    draw_grid,
    draw_matrix,
    draw_series,
)
from common.report.page import (
    ReportAnswer,
    ReportPage,
    ReportTable,
    Section,
    format_bytes,
    format_estimate,
    format_seconds,
    format_value,
    join_words,
    write_report,
)
from common.report.svg import COLOURS

HOSTILE = '<script>alert("x")</script>'


def make_figures(name: str) -> list[Figure]:
    """One of each kind, with a name of a stranger in every place."""
    return [
        draw_estimates(name, [Estimated(name, 0.5, (0.4, 0.6), True), Estimated(name, None)], name),
        draw_series(name, [Series(name, [1, 2], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3])], ("round", name), limit=0.3),
        draw_calibration(name, [Frequency(0.0, 1.0, 0.5, 0.5, (0.4, 0.6), 10.0)], name),
        draw_matrix(name, [name, name], [[1.0, 0.0], [0.5, 0.5]], [["1", "0"], ["2", "2"]]),
        draw_grid(name, [name], [1, 2], [["took part", "none"]], [("took part", "T", 0)]),
    ]


def make_page(name: str, figures: list[Figure]) -> str:
    """A page with a name of a stranger in every place."""
    table = ReportTable(name, (name, "number"), [(name, name)], ("number",))
    section = Section(name, name, figures, [table], [name])
    return write_report(ReportPage(name, name, name, [ReportAnswer("good", name, name)], [section], name, [name]))


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return make_page(HOSTILE, make_figures(HOSTILE))


def test_a_name_is_never_markup(hostile_page: str) -> None:
    assert "<script" not in hostile_page
    assert hostile_page.count("&lt;script&gt;") >= 15, "it stands there, as text"


def test_a_page_asks_for_nothing_from_elsewhere(hostile_page: str) -> None:
    found: list[tuple[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe", "object", "embed", "img", "image"), tag
            found.extend((name, value or "") for name, value in attrs)

    Reader().feed(hostile_page)
    for name, value in found:
        assert not name.startswith("on"), name
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
        assert name.startswith("xmlns") or "//" not in value, (name, value)
    assert "url(" not in hostile_page.replace("url(#", "")
    assert "default-src 'none'" in hostile_page


@pytest.mark.parametrize("number", range(5))
def test_a_figure_is_whole_and_says_what_it_shows(number: int) -> None:
    svg = make_figures(HOSTILE)[number].svg
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == HOSTILE
    assert root[0].tag.endswith("title") and root[0].text == HOSTILE
    assert any(each.tag.endswith("text") for each in root.iter()), "text stays text"
    assert "width" not in root.attrib and root.attrib["viewBox"].startswith("0 0 ")
    assert "font: 10px inherit" not in svg


def test_a_figure_s_colours_are_the_page_s() -> None:
    for figure in make_figures("a"):
        used = set(re.findall(r"#[0-9a-f]{6}", figure.svg))
        # What matplotlib leaves black is hidden or has no stroke.
        assert not used & set(COLOURS), used
        assert "var(--text)" in figure.svg


def test_names_with_signs_of_formulas_are_drawn_as_they_are() -> None:
    for figure in make_figures("a $x^2$ & _b_ $"):
        texts = [each.text or "" for each in ElementTree.fromstring(figure.svg).iter() if each.tag.endswith("text")]
        assert any("a $x^2$ & _b_" in text for text in texts), texts


def test_names_of_other_scripts_and_control_characters_are_no_fault() -> None:
    page = make_page("病院\x00\x1b[31m", make_figures("病院\x00\x1b[31m"))
    assert "病院" in page and "\x00" not in page and "\x1b" not in page


def test_ids_of_two_figures_do_not_meet_and_all_references_are_kept() -> None:
    svgs = [figure.svg for figure in make_figures("a")]
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in svgs]
    for own, svg in zip(ids, svgs, strict=True):
        assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)) <= {(a, "") for a in own} | {
            ("", a) for a in own
        }
    assert len({each for own in ids for each in own}) == sum(map(len, ids))


def test_the_same_numbers_give_the_same_page() -> None:
    assert make_page("a", make_figures("a")) == make_page("a", make_figures("a"))


def test_long_tables_are_folded_and_commands_marked() -> None:
    table = ReportTable("rows", ("a",), [(str(row),) for row in range(40)])
    page = write_report(ReportPage("t", "run `x <y>` now", "q", [], [Section("s", "l", tables=[table])], "f"))
    assert "<details><summary>rows (40 rows)</summary>" in page
    assert "<code>x &lt;y&gt;</code>" in page


def test_numbers_are_written_for_people() -> None:
    assert format_value(0.82345) == "0.823" and format_value(None) == "undefined" and format_value(12.345) == "12.3"
    assert format_estimate(0.5, (0.4, 0.6)) == "0.500 (0.400 to 0.600)" and format_estimate(0.5, None) == "0.500"
    assert format_bytes(999) == "999 bytes" and format_bytes(3 << 20) == "3.0 MiB" and format_bytes(None) == "none"
    assert (
        format_seconds(0.25) == "0.25 s" and format_seconds(125) == "2 min 5 s" and format_seconds(7300) == "2 h 1 min"
    )
    assert join_words(["a", "b", "c"]) == "a, b and c" and join_words(list("abc"), 2) == "a, b and 1 more"


def test_many_cells_are_few_elements() -> None:
    """A grid of 60 sites and 200 rounds was ten megabytes, and took minutes, where each cell was a patch."""
    cells = [["took part"] * 200 for _ in range(60)]
    figure = draw_grid(
        "grid", [f"site-{number}" for number in range(60)], list(range(1, 201)), cells, [("took part", "", 0)]
    )
    assert len(figure.svg) < 100_000 and figure.wide
