"""report.md as one HTML file that needs no network: pictures inside it, tables that scroll on a phone.

Names and notes in it come from data sets and run folders that may be a stranger's: `as_text` and `as_code` put them
into Markdown as text, and the page lets through no HTML, and no link but to the web, beside it or within it.
"""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.log import printable

_MARKUP = re.compile(r"[\\`*\[\]|<>&$~#]|(?<!\w)_|_(?!\w)")
_LINK = re.compile(r"https?://|#|[^:]*$", re.IGNORECASE)  # to the web, within the page, beside it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # should a script get in, it does not run

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --rule: #c8c8c8; --band: #f3f3f3; --link: #0645ad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --rule: #4a4a4a; --band: #232323; --link: #8ab4f8; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 1.8em 0 .5em; }
h1 { margin-top: .4em; }
a { color: var(--link); }
.table { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; background: var(--band); }
tbody tr:hover { background: var(--band); }
figure { margin: 1.5em 0; }
img { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .9rem; }
blockquote { margin: 1em 0; padding: .1em 1em; border-left: 4px solid #b35900; background: var(--band); }
code { font-size: .9em; overflow-wrap: anywhere; }
nav ul { padding-left: 1.2em; columns: 2; }
@media (max-width: 40rem) { nav ul { columns: 1; } body { padding: .75rem; } }
"""


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


def to_html(text: str, folder: Path, alternatives: Mapping[str, str]) -> str:
    """Markdown with tables and pictures from `folder` -> a page. `alternatives`: text for each picture by file name."""
    import markdown

    converter = markdown.Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-2"}})
    converter.preprocessors.deregister("html_block")  # HTML is then text like any other
    converter.inlinePatterns.deregister("html")
    body = converter.convert(text)
    body = re.sub("<(?:a|img) [^>]*>", lambda match: _without_strange_links(match[0], alternatives), body)
    title = re.search("<h1[^>]*>(.*?)</h1>", body)
    body = body.replace("<table>", '<div class="table" tabindex="0" role="region" aria-label="table"><table>')
    body = re.sub(r"<th(?=[ >])", '<th scope="col"', body.replace("</table>", "</table></div>"))
    body = re.sub(
        r'<p><img alt="[^"]*" src="([^"]+)" ?/></p>\s*<p><em>(.*?)</em></p>',
        lambda match: _figure(match[1], match[2], folder, alternatives),
        body,
    )
    head, separator, rest = body.partition("<h2")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{re.sub('<[^>]*>', '', title[1]) if title else 'Report'}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{head}"
        f'<nav aria-label="contents">{getattr(converter, "toc", "")}</nav>\n'
        f"{separator}{rest}\n</main>\n</body>\n</html>\n"
    )


def _without_strange_links(tag: str, pictures: Mapping[str, str]) -> str:
    """A tag as the converter wrote it, without `href` to anything but a page and without `src` but of our pictures."""

    def kept(match: re.Match[str]) -> str:
        link = html.unescape(match[2])
        return match[0] if (link in pictures if match[1] == "src" else _LINK.match(link)) else ""

    return re.sub(' (href|src)="([^"]*)"', kept, tag)


def _figure(name: str, caption: str, folder: Path, alternatives: Mapping[str, str]) -> str:
    content = base64.b64encode((folder / name).read_bytes()).decode()
    text = html.escape(alternatives[name])
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{content}"><figcaption>{caption}</figcaption></figure>'
    )
