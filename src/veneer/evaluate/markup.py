"""HTML that is escaped by construction: text becomes HTML only through :func:`esc`, or as a child of :func:`tag`."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable
from html.parser import HTMLParser

MAX_TEXT = 1500  # characters of one text in a sample
LEAST_ALIKE = 0.4  # two texts with less in common are two texts: marks would be all over them
MAX_DIFF = 1500  # beyond this many characters the words are not compared: difflib is quadratic

# Control characters are shown as their pictures (U+2400 on): in HTML they would vanish, or be an error.
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421, 0x0D: None}
_VOID = {"br"}


class Html(str):
    """A string that is HTML already."""

    __slots__ = ()


def esc(value: object) -> Html:
    """Any value as HTML: text is escaped, what is HTML already stays."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).translate(_CONTROLS)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts after one another, each escaped unless it is HTML."""
    return Html(esc(between).join(esc(part) for part in parts if part is not None))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. Text children and all attribute values are escaped; None is left out.

    ``class_`` is the attribute ``class``; other underscores become hyphens (``aria_label``).
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    head = name + "".join(f' {key}="{html.escape(str(value).translate(_CONTROLS))}"' for key, value in pairs)
    return Html(f"<{head}>" if name in _VOID else f"<{head}>{join(children)}</{name}>")


def plain(text: str, limit: int = MAX_TEXT) -> Html:
    """Text, cut after ``limit`` characters with a note of how many more there are."""
    rest = len(text) - limit
    if rest <= 0:
        return esc(text)
    return join([text[:limit], tag("span", f" … {rest:,} more characters", class_="cut")])


def section(title: str, *children: object, intro: str | None = None, id_: str | None = None) -> Html:
    """A titled section; empty where all its children are."""
    if not any(child for child in children):
        return Html("")
    lead = tag("p", intro, class_="intro") if intro else None
    return tag("section", tag("h2", title), lead, *children, id=id_)


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# --- what differs ----------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\s+|\w+|[^\w\s]")


def marked(text: str, reference: str) -> Html:
    """Text with the words that ``reference`` does not have there in ``<mark>``; an empty one where some are missing."""
    if max(len(text), len(reference)) > MAX_DIFF:
        return plain(text)
    left, right = _WORD.findall(reference), _WORD.findall(text)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return plain(text)
    out: list[Html] = []
    for kind, _, _, start, end in matcher.get_opcodes():
        part = "".join(right[start:end])
        if kind == "equal":
            out.append(esc(part))
        elif kind == "delete":
            out.append(tag("mark", class_="gap", title="something is missing here"))
        else:
            out.append(tag("mark", part))
    return join(out)


# --- YAML ------------------------------------------------------------------------------------------------------------

_YAML_LINE = re.compile(r"(?P<lead>\s*(?:- )?)(?P<key>[\w.-]+)(?P<rest>:.*?)(?P<comment>\s+#.*)?")


def yaml_html(text: str) -> Html:
    """YAML with its keys and comments tinted."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        found = _YAML_LINE.fullmatch(line)
        if found:
            comment = tag("span", found["comment"], class_="yaml-comment") if found["comment"] else None
            lines.append(join([found["lead"], tag("span", found["key"], class_="yaml-key"), found["rest"], comment]))
        elif line.lstrip().startswith("#"):
            lines.append(tag("span", line, class_="yaml-comment"))
        else:
            lines.append(esc(line))
    return join(lines, "\n")


# --- foreign HTML ----------------------------------------------------------------------------------------------------

_TAGS = {"b", "br", "code", "div", "em", "figcaption", "figure", "i", "li", "mark", "ol", "p", "pre", "small", "span"}
_TAGS |= {"strong", "u", "ul"}
_DROPPED_WITH_CONTENT = {"script", "style", "iframe", "object", "svg", "math", "template", "noscript", "title"}
_CLASS = re.compile(r"[\w -]*")


class _Cleaner(HTMLParser):
    """Rebuilds what it reads from known tags with ``class`` and ``title`` alone; text is escaped again.

    Styles are dropped, since they are made for light pages alone; what had a background is of the class ``trained``.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.dropping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _DROPPED_WITH_CONTENT:
            self.dropping.append(tag)
        elif tag in _TAGS and not self.dropping:
            given = {name: value for name, value in attrs if value is not None}
            if not _CLASS.fullmatch(given.get("class", "")):
                del given["class"]
            if "background" in given.get("style", ""):
                given["class"] = "trained"
            kept = "".join(f' {name}="{html.escape(given[name])}"' for name in ("class", "title") if name in given)
            self.parts.append(f"<{tag}{kept}>")
            if tag not in _VOID:
                self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.dropping:
            if tag == self.dropping[-1]:
                self.dropping.pop()
        elif tag in self.open:
            while self.open:
                last = self.open.pop()
                self.parts.append(f"</{last}>")
                if last == tag:
                    break

    def handle_data(self, data: str) -> None:
        if not self.dropping:
            self.parts.append(esc(data))


def clean_html(text: str) -> Html:
    """HTML of a file that anybody may have written, reduced to harmless tags, closed where they were left open."""
    cleaner = _Cleaner()
    cleaner.feed(text)
    cleaner.close()
    return Html("".join(cleaner.parts) + "".join(f"</{name}>" for name in reversed(cleaner.open)))
