"""report.md as one HTML file that needs no network: charts that answer, sections that fold, tables that fit a phone.

Names and notes in it come from data sets and run folders that may be a stranger's: `as_text` and `as_code` put them
into Markdown as text, and the page lets through no HTML, and no link but to the web, beside it or within it. Of scripts
it runs its own two, known by their hashes.
"""

import html
import itertools
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from toolkit.log import printable

_MARKUP = re.compile(r"[\\`*\[\]|<>&$~#]|(?<!\w)_|_(?!\w)")
_LINK = re.compile(r"https?://|#|[^:]*$", re.IGNORECASE)  # to the web, within the page, beside it
_PAGE = Path(__file__).parent / "page"
_TABLE = '<div class="table" tabindex="0" role="region" aria-label="table {}"><table>'
_DATA = (
    "<noscript>The charts need JavaScript; report.md shows them as pictures.</noscript>\n"
    '<script type="application/json" id="data">{}</script>\n'
)
_SCRIPTS = ("echarts.min.js", "page.js")


def as_text(value: Any) -> str:
    """`value` as Markdown that shows it in one line as it is: no markup, no HTML, no other column of a table."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", _one_line(value))


def as_code(value: Any) -> str:
    """`value` as Markdown's code, in one line as it is."""
    text = _one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _one_line(value: Any) -> str:
    return printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")


def to_html(text: str, charts: Mapping[str, str], data: str = "") -> str:
    """Markdown with tables and pictures -> a page that draws the pictures named in `charts` itself.

    `charts`: file name -> text for those who do not see it; `data`: the JSON that page/page.js draws from, without it
    the page has no script. Sections without a chart are folded, but for the first.
    """
    import markdown

    converter = markdown.Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")  # HTML is then text like any other
    converter.inlinePatterns.deregister("html")
    body = converter.convert(text)
    body = re.sub("<(?:a|img) [^>]*>", lambda match: _without_strange_links(match[0], charts), body)
    title = re.search("<h1[^>]*>(.*?)</h1>", body)
    number = itertools.count(1)
    body = re.sub("<table>", lambda _: _TABLE.format(next(number)), body)
    body = re.sub(r"<th(?=[ >])", '<th scope="col"', body.replace("</table>", "</table></div>"))
    body = re.sub(
        r'<p><img alt="[^"]*" src="([^"]+)" ?/></p>\s*<p><em>(.*?)</em></p>',
        lambda match: _figure(match[1], match[2], charts),
        body,
    )
    opening, *sections = re.split("(?=<h2>)", body)
    scripts = [(_PAGE / name).read_text() for name in _SCRIPTS] if data else []
    hashes = "".join(f" 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'{f'; script-src{hashes}' if hashes else ''}"
    elements = [f"<script>{script}</script>" for script in scripts]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{re.sub('<[^>]*>', '', title[1]) if title else 'Report'}</title>\n"
        f"<style>{(_PAGE / 'page.css').read_text()}</style>\n</head>\n<body>\n<main>\n"
        f"{opening}{''.join([*sections[:1], *map(_folded, sections[1:])])}\n</main>\n"
        f"{_DATA.format(data) if data else ''}{''.join(elements)}\n</body>\n</html>\n"
    )


def _folded(section: str) -> str:
    """A section under its heading; one without a chart opens on demand."""
    if "<figure>" in section:
        return section
    heading, end, rest = section.partition("</h2>")
    return f"<details><summary>{heading}{end}</summary>{rest}</details>\n"


def _without_strange_links(tag: str, charts: Mapping[str, str]) -> str:
    """A tag as the converter wrote it, without `href` to anything but a page and without `src` but of our charts."""

    def kept(match: re.Match[str]) -> str:
        link = html.unescape(match[2])
        return match[0] if (link in charts if match[1] == "src" else _LINK.match(link)) else ""

    return re.sub(' (href|src)="([^"]*)"', kept, tag)


def _figure(name: str, caption: str, charts: Mapping[str, str]) -> str:
    text = html.escape(charts[name])
    return (
        f'<figure><div class="chart" id="{Path(name).stem}" role="img" aria-label="{text}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
