from __future__ import annotations

import pytest

from weights.corpus.wikitext import is_article, strip_markup


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("'''Bold''' and ''slanted''.", "Bold and slanted."),
        ("A [[whale|great whale]] in the [[sea]].", "A great whale in the sea."),
        ("[[Mercury (planet)|]] is near.", "Mercury is near."),
        ("Text{{cite|{{nested}} one}} goes on.", "Text goes on."),
        ("Before{| class=x\n| a || {| inner\n|}\n|}after", "Beforeafter"),
        ("See [[Image:a.png|thumb|a [[ship]] at [[sea]]]]this.", "See this."),
        ("End.\n[[Category:Ships]]\n[[de:Schiff]]", "End."),
        ("Two<ref name=a>where</ref> words<ref name=b />.", "Two words."),
        ("Mass <math>m \\over c</math>is.", "Mass is."),
        ("Born (; 1800) in [http://example.org York].", "Born (1800) in York."),
        ("Born ( , ; ) late.", "Born late."),
        ("A&nbsp;b &amp;ndash; c &lt;3", "A b \u2013 c <3"),
        ("One<br />two", "One\n\ntwo"),
        ("<!-- hidden -->shown", "shown"),
        ("* first\n* second\n\nAfter.", "- first\n- second\n\nAfter."),
    ],
)
def test_markup_becomes_what_a_reader_sees(source: str, shown: str) -> None:
    assert strip_markup(source) == shown


def test_headings_stay_only_over_text() -> None:
    source = (
        "Lead.\n== Life ==\nHe lived.\n== Empty ==\n== See also ==\n* [[Other]]\n=== Sub ===\nx y"
    )
    assert strip_markup(source) == "Lead.\n\nLife\n\nHe lived."


@pytest.mark.parametrize(
    ("title", "text", "wanted"),
    [
        ("Whale", "A whale is...", True),
        ("Star Trek: Voyager", "A series.", True),
        ("Wikipedia:Sandbox", "text", False),
        ("User talk:Someone", "text", False),
        ("Whales", "#redirect [[Whale]]", False),
        ("Mercury", "May be: {{disambig}}", False),
    ],
)
def test_only_articles_are_read(title: str, text: str, wanted: bool) -> None:
    assert is_article(title, text) is wanted
