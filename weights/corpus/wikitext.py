"""MediaWiki markup -> plain paragraphs.

Made for dumps of about 2006: what cannot be shown as plain text (templates, tables, pictures,
formulas, footnotes) is dropped, what can (links, headings, lists, emphasis) keeps its words.
"""

from __future__ import annotations

import html
import re

# Elements whose content is not prose: dropped whole, with what stands between their tags.
_OPAQUE = "math|ref|gallery|timeline|table|imagemap|hiero|pre|code|source|score"
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_OPAQUE_EMPTY = re.compile(rf"<(?:{_OPAQUE})\b[^<>]*/>", re.IGNORECASE)
_OPAQUE_PAIR = re.compile(rf"<({_OPAQUE})\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_BREAK = re.compile(r"<(?:br|hr)\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Innermost first: repeated until nothing is left to drop, so nesting of any depth is handled.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?|ftp|mailto):[^\s\]]*\s*([^\[\]]*)\]")
_UNBALANCED = re.compile(r"\[\[|\]\]|\{\{|\}\}")  # an author forgot the other half
_URL = re.compile(r"\bhttps?://\S+")
_EMPHASIS = re.compile(r"'{2,}")
_MAGIC = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1\s*$")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
# What is left of a parenthesis or a sentence whose content was markup: "( ; )", " ,".
_EMPTY_PARENTHESES = re.compile(r"\s*\((?:\s|[;:,\u2013\u2014-])*\)")
_LEADING_IN_PARENTHESES = re.compile(r"\((?:\s|[;:,])+")
_SPACE_BEFORE = re.compile(r"[ \t]+([,.;:!?)])(?=\s|$)")
_SPACES = re.compile(r"[ \t\u00a0]+")

_DROPPED_NAMESPACES = frozenset({"image", "file", "media", "category"})
_NAMESPACES = _DROPPED_NAMESPACES | {
    "wikipedia", "template", "help", "portal", "user", "talk", "mediawiki", "special",
}  # fmt: skip
_LANGUAGE = re.compile(r"^(?:[a-z]{2,3}|simple|[a-z]{2,3}-[a-z-]{2,8})$")
_DROPPED_SECTIONS = frozenset(
    {
        "see also", "external links", "external link", "references", "reference", "notes",
        "further reading", "bibliography", "footnotes", "sources", "links", "related topics",
        "discography", "filmography", "external references", "notes and references",
    }
)  # fmt: skip


def is_article(title: str, text: str) -> bool:
    """Whether a page is an article: no other namespace, no redirect, no disambiguation."""
    namespace, colon, _ = title.partition(":")
    if colon and (namespace.lower() in _NAMESPACES or namespace.lower().endswith(" talk")):
        return False
    if text.lstrip().upper().startswith("#REDIRECT"):
        return False
    return "{{disambig" not in text.lower() and not title.startswith("List of ")


def strip_markup(text: str) -> str:
    """Wikitext -> paragraphs parted by blank lines; the items of a list have a line each."""
    text = _COMMENT.sub("", text)
    text = _OPAQUE_PAIR.sub("", _OPAQUE_EMPTY.sub("", text))
    text = _repeat(_TEMPLATE, "", text)
    text = _repeat(_TABLE, "", text)
    text = _repeat_links(text)
    text = _UNBALANCED.sub("", _EXTERNAL.sub(r"\1", text))
    text = _URL.sub("", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _MAGIC.sub("", _EMPHASIS.sub("", text))
    # A dump escapes once for XML, an author once more for HTML: &amp;nbsp;
    text = html.unescape(html.unescape(text))
    text = _EMPTY_PARENTHESES.sub("", text)
    text = _LEADING_IN_PARENTHESES.sub("(", text)
    text = _SPACE_BEFORE.sub(r"\1", _SPACES.sub(" ", text))
    return _lines_to_paragraphs(text.split("\n"))


def _repeat(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _repeat_links(text: str) -> str:
    count = 1
    while count:
        text, count = _LINK.subn(_link_text, text)
    return text


def _link_text(match: re.Match[str]) -> str:
    """What a reader sees of [[target|label]]; nothing for pictures, categories, other languages."""
    target, bar, label = match.group(1).partition("|")
    namespace, colon, rest = target.strip().partition(":")
    if colon and namespace:
        if namespace.strip().lower() in _DROPPED_NAMESPACES:
            return ""
        if not bar and _LANGUAGE.match(namespace.strip()):
            return ""
    if bar:
        label = label.rpartition("|")[2]
        # The "pipe trick" [[Mercury (planet)|]] shows the target without its parenthesis.
        return label or re.sub(r"\s*\(.*\)$", "", rest if colon else target)
    return target.lstrip(":")


def _lines_to_paragraphs(lines: list[str]) -> str:
    blocks: list[str] = []
    pending: list[str] = []  # headings that wait for a text below them
    in_list = False
    dropping = 0  # level of the section being dropped; 0 outside one
    for line in map(str.strip, lines):
        if heading := _HEADING.match(line):
            level, title = len(heading.group(1)), heading.group(2)
            if dropping and level > dropping:
                continue
            dropping = level if title.lower() in _DROPPED_SECTIONS else 0
            pending = [] if dropping else [title]
            in_list = False
            continue
        if dropping or not line or line[0] in "|!" or line.startswith(("{|", "|}", "----")):
            in_list = in_list and not line
            continue
        item = _LIST_MARK.match(line)
        shown = line[item.end() :].strip() if item else line
        if len(shown) < 2:
            continue
        blocks.extend(pending)
        pending = []
        if item and in_list and blocks:
            blocks[-1] += f"\n- {shown}"
        else:
            blocks.append(f"- {shown}" if item else shown)
        in_list = item is not None
    return "\n\n".join(blocks)
