from __future__ import annotations

import io

import pytest

from ffprune.core.errors import MissingInput, UnsafeFile
from ffprune.sources.wikipedia import read_articles, strip_markup

PAGE = """<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"""


def export(*pages: str) -> io.BytesIO:
    name = "http://www.mediawiki.org/xml/export-0.10/"
    return io.BytesIO(f'<mediawiki xmlns="{name}">{"".join(pages)}</mediawiki>'.encode())


def page(title: str, text: str, ns: int = 0, extra: str = "") -> str:
    return PAGE.format(title=title, ns=ns, extra=extra, text=text)


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("A [[link]] and [[target|words]].", "A link and words."),
        ("[[File:A.jpg|thumb|left|A [[nested]] caption]]Text.", "Text."),
        ("Text.[[Category:Things]]\n[[fr:Chose]]", "Text."),
        ("{{Infobox|a={{b|c}}\n|d=e}}Text.", "Text."),
        ("One<ref name=a>{{cite}}</ref> two<ref name=b />.", "One two."),
        ("Before\n{| class=x\n|-\n| cell || cell\n|}\nAfter", "Before\n\nAfter"),
        ("Before\n\n| stray = row\n|-\n! head\n\nAfter", "Before\n\nAfter"),
        ("<gallery>\nFile:A.jpg|b\n</gallery>Text<!-- hidden -->.", "Text."),
        ("Five&nbsp;km &amp; more &mdash; yes", "Five km & more — yes"),
        ("It is {{convert|5|km|mi}} long.", "It is 5 km long."),
        ("It is {{convert|5|-|6|km|mi|abbr=on}} long.", "It is 5\u20136 km long."),
        ("The word {{lang|la|corpus}} is {{lang-la|corpora}}.", "The word corpus is corpora."),
        ("Asphalt ({{IPA|x}}, or {{IPA|y}}) is sticky.", "Asphalt is sticky."),
        ("Adobe ({{IPA|x}}; Spanish: brick) is old.", "Adobe (Spanish: brick) is old."),
        ("See [http://x.org the site] and http://y.org.", "See the site and."),
        ("* one\n* two\n# three", "one\ntwo\nthree"),
        ("H<sub>2</sub>O and x<sup>2</sup>", "H2O and x2"),
        ("Where <math>x^2</math> grows", "Where grows"),
        ("__NOTOC__Text", "Text"),
        ("A\n\n\n\n\nB", "A\n\nB"),
        ("unclosed {{template and [[link", "unclosed template and link"),
    ],
)
def test_markup_becomes_prose(markup: str, prose: str) -> None:
    assert strip_markup(markup) == prose


def test_sections_of_links_go_with_their_subsections() -> None:
    markup = "Intro\n== See also ==\n* [[A]]\n=== Lists ===\n* [[B]]\n== History ==\nOld\n== Notes ==\n* x"
    assert strip_markup(markup) == "Intro\n\nHistory\n\nOld"


def test_headings_without_text_go_and_parents_stay() -> None:
    markup = "Intro\n== Data ==\n{| \n| x\n|}\n== History ==\n=== Early ===\nOld"
    assert strip_markup(markup) == "Intro\n\nHistory\n\nEarly\n\nOld"


def test_only_articles_are_read_in_order() -> None:
    stream = export(
        page("First", "One."),
        page("Talk:First", "Chat.", ns=1),
        page("Moved", "#REDIRECT [[First]]", extra='<redirect title="First" />'),
        page("Empty", "{{stub}}"),
        page("Second", "Two &amp;amp; three."),
    )
    articles = read_articles(stream, "x")
    assert [a.title for a in articles] == ["First", "Second"]
    assert articles[1].text == "Second\n\nTwo & three.\n\n\n"


def test_entities_are_refused() -> None:
    with pytest.raises(UnsafeFile):
        read_articles(io.BytesIO(b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>'), "x")


@pytest.mark.parametrize("content", [b"plain text", b"<mediawiki></mediawiki>", b"<mediawiki><page>"])
def test_what_is_no_export_is_told(content: bytes) -> None:
    with pytest.raises(MissingInput):
        read_articles(io.BytesIO(content), "x")
