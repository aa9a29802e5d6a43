"""A MediaWiki XML export to articles of plain prose."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import IO, Any

import mwparserfromhell
from mwparserfromhell import nodes

from ffprune.core.errors import MissingInput, UnsafeFile
from ffprune.sources.base import Article

# Sections that hold lists of links and citations, not prose (and everything below them).
_LINK_SECTIONS = frozenset(
    {
        "see also",
        "references",
        "external links",
        "further reading",
        "notes",
        "notes and references",
        "references and notes",
        "footnotes",
        "citations",
        "bibliography",
        "sources",
        "works cited",
        "literature",
        "gallery",
        "image gallery",
    }
)
# Tags whose contents are not prose.
_DROPPED_TAGS = frozenset(
    [
        "ref",
        "references",
        "gallery",
        "table",
        "math",
        "chem",
        "timeline",
        "score",
        "syntaxhighlight",
        "source",
        "pre",
        "imagemap",
        "hiero",
        "graph",
        "mapframe",
        "maplink",
        "templatestyles",
        "inputbox",
        "categorytree",
        "section",
        "style",
        "script",
    ]
)
_MEDIA = re.compile(r"^\s*:?\s*(file|image|category|media)\s*:", re.IGNORECASE)
_INTERWIKI = re.compile(r"^\s*[a-z]{2,3}(-[a-z]+)*\s*:\S")
_BEHAVIOUR = re.compile(r"__[A-Z]+__")


def _argument(template: Any, number: int) -> str:
    name = str(number)
    return _render(template.get(name).value) if template.has(name) else ""


def _quantity(template: Any) -> str:
    """``{{convert|5|-|6|km|mi}}`` reads "5-6 km"."""
    words: list[str] = []
    for number in range(1, 5):
        word = _argument(template, number).strip()
        if not word:
            break
        words.append(word)
        if number > 1 and not re.match(r"^[\d.,]+$|^(-|\u2013|to|and|or|by|x|\u00d7|\+/-|±)$", word):
            break
    return re.sub(r" (-|\u2013) ", "\u2013", " ".join(words))


def _joined(template: Any) -> str:
    """``{{lang-la|corpus}}`` and other one-argument templates: the argument."""
    return _argument(template, 1)


# Templates that are words of the sentence they stand in; any other template is dropped.
_TEMPLATES: dict[str, Callable[[Any], str]] = {
    "convert": _quantity,
    "cvt": _quantity,
    "lang": lambda t: _argument(t, 2),
    "transl": lambda t: _argument(t, 3) or _argument(t, 2),
    "nowrap": _joined,
    "nobold": _joined,
    "nobr": _joined,
    "em": _joined,
    "strong": _joined,
    "quote": _joined,
    "blockquote": _joined,
    "quotation": _joined,
    "cquote": _joined,
    "val": _joined,
    "circa": lambda t: ("c. " + _argument(t, 1)).strip(),
    "c.": lambda t: ("c. " + _argument(t, 1)).strip(),
    "frac": lambda t: "/".join(filter(None, (_argument(t, n) for n in (1, 2, 3)))),
    "sup": _joined,
    "sub": _joined,
    "smallcaps": _joined,
    "ndash": lambda t: "\u2013",
    "spaced ndash": lambda t: " \u2013 ",
    "snd": lambda t: " \u2013 ",
    "mdash": lambda t: "—",
    "'": lambda t: "'",
    "'s": lambda t: "'s",
    "=": lambda t: "=",
    "!": lambda t: "|",
}


def _template(node: Any) -> str:
    name = str(node.name).strip().lower().replace("_", " ")
    if name.startswith("formatnum:"):
        return _render(node.name).partition(":")[2]
    if name.startswith("lang-"):
        return _joined(node)
    render = _TEMPLATES.get(name)
    return render(node) if render else ""


def _wikilink(node: Any) -> str:
    title = str(node.title)
    if _MEDIA.match(title) or (node.text is None and _INTERWIKI.match(title)):
        return ""
    return _render(node.text) if node.text is not None else title.strip().lstrip(":").partition("#")[0] or title


def _tag(node: Any) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS or name in (
        "li",
        "dd",
        "dt",
    ):  # a list item's sign; its words are text of their own
        return ""
    if name in ("br", "hr"):
        return "\n"
    return _render(node.contents) if node.contents is not None else ""


def _entity(node: Any) -> str:
    try:
        return str(node.normalize())
    except ValueError:
        return ""


def _render(code: Any) -> str:
    return "".join(_render_node(node) for node in code.nodes)


def _render_node(node: Any) -> str:
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.Wikilink):
        return _wikilink(node)
    if isinstance(node, nodes.Template):
        return _template(node)
    if isinstance(node, nodes.Tag):
        return _tag(node)
    if isinstance(node, nodes.HTMLEntity):
        return _entity(node)
    if isinstance(node, nodes.ExternalLink):
        return _render(node.title) if node.title is not None else ""
    if isinstance(node, nodes.Heading):
        return f"\n\n{_render(node.title).strip()}\n\n"
    return ""  # comments, template arguments


_TIDY: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.MULTILINE), repl)
    for pattern, repl in (
        (r"'{2,}", ""),  # bold and italics
        (r"^[ \t]*(\{\||\|\}|\|-|\|\+|\||!).*$", ""),  # rows of tables that were not closed
        (r"\{\{|\}\}|\[\[|\]\]", ""),  # brackets that were not closed
        (r"</?[a-zA-Z][^<>\n]*>", ""),  # tags that were not closed
        (r"[\u00a0\u2009\u202f\t]", " "),
        (r"[\u200b-\u200f\ufeff]", ""),
        (r"^[*#:;]+[ ]*", ""),  # signs of list items
        (r"^.*\bISBN[ :]?[\dX-]{9,}.*$", ""),  # entries of book lists
        (r"\((?:[ ,;:]|\bor\b)*\)", ""),  # brackets around nothing
        (r"\((?:\s*[,;:])+\s*", "("),
        (r"[ ]*[,;:]?\s*\)(?<=[,;: ]\))", ")"),
        (r"[ ]{2,}", " "),
        (r"[ ]+([,.;:!?)])(?=\s|$)", r"\1"),
        (r"([,;]) ?(?=[,;])", ""),
        (r"^ +| +$", ""),
        (r"^[*#:;]+ +", ""),
        (r"^[^\w\n]{1,3}$", ""),  # lines of stray signs
        (r"\n{3,}", "\n\n"),
    )
)


def _tidy(text: str) -> str:
    text = html.unescape(text)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def _without_empty_sections(text: str, levels: dict[str, int]) -> str:
    """Drop headings with nothing below them (their section was a table or a gallery)."""
    kept: list[str] = []
    for paragraph in reversed(text.split("\n\n")):
        level = levels.get(paragraph)
        if level is not None and (not kept or levels.get(kept[-1], 99) <= level):
            continue
        kept.append(paragraph)
    return "\n\n".join(reversed(kept))


def strip_markup(markup: str) -> str:
    """The prose of one page of wiki markup.

    Args:
        markup: MediaWiki source text.

    Returns:
        Paragraphs, list items and headings, each a line of plain text. Templates, tables, references,
        galleries, files, categories, comments and the sections of links ("See also", "References", ...)
        are gone.
    """
    code = mwparserfromhell.parse(_BEHAVIOUR.sub("", markup), skip_style_tags=True)
    pieces: list[str] = []
    levels: dict[str, int] = {}
    skipped_level: int | None = None
    for node in code.nodes:
        if isinstance(node, nodes.Heading):
            title = _render(node.title).strip()
            if skipped_level is not None and node.level > skipped_level:
                continue
            skipped_level = node.level if title.lower() in _LINK_SECTIONS else None
            levels[_tidy(title)] = int(node.level)
        if skipped_level is None:
            pieces.append(_render_node(node))
    return _without_empty_sections(_tidy("".join(pieces)), levels)


def _pages(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, markup) of every article: namespace 0, no redirects."""
    root: ET.Element | None = None
    for event, element in ET.iterparse(stream, events=("start", "end")):
        if root is None:
            root = element
        if event != "end" or element.tag.rpartition("}")[2] != "page":
            continue
        facts = {child.tag.rpartition("}")[2]: child for child in element}
        text = next((t for t in element.iter() if t.tag.rpartition("}")[2] == "text"), None)
        namespace = facts["ns"].text if "ns" in facts else "0"
        if namespace == "0" and "redirect" not in facts and text is not None and text.text:
            yield facts["title"].text or "" if "title" in facts else "", text.text
        root.clear()


def read_articles(stream: IO[bytes], name: str) -> list[Article]:
    """Articles of a MediaWiki XML export, in the order of the file.

    Args:
        stream: the XML, decompressed, seekable.
        name: what to call the file in messages.

    Raises:
        UnsafeFile: the XML declares a document type (exports never do; entities could be declared there).
        MissingInput: not XML, or no article in it.
    """
    if b"<!DOCTYPE" in stream.read(1 << 16):
        raise UnsafeFile(
            f"{name} declares a document type, where XML entities can be defined",
            "MediaWiki exports have none, so this is not one",
            "Use an unmodified export (Special:Export or dumps.wikimedia.org)",
        )
    stream.seek(0)
    try:
        articles = [
            Article(title, f"{title}\n\n{prose}\n\n\n")
            for title, markup in _pages(stream)
            if (prose := strip_markup(markup))
        ]
    except ET.ParseError as error:
        raise MissingInput(
            f"{name} was to be read as a MediaWiki XML export, and is not well-formed XML ({error})",
            "The format `wikipedia` reads XML exports, plain or compressed by bzip2 or gzip",
            "Set data.format to plain or jsonl, or point data.source to an export",
        ) from error
    if not articles:
        raise MissingInput(
            f"{name} has no article with text",
            "Only pages of namespace 0 that are not redirects count",
            "Point data.source to an export that has articles",
        )
    return articles
