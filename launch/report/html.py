"""report.md as one HTML file that needs no network: pictures inside it, tables that scroll on a phone."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

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


def to_html(text: str, folder: Path, alternatives: Mapping[str, str]) -> str:
    """Markdown with tables and pictures from `folder` -> a page. `alternatives`: text for each picture by file name."""
    import markdown

    title = next(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    converter = markdown.Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-2"}})
    body = converter.convert(text)
    body = re.sub(r"<table>", '<div class="table" tabindex="0" role="region" aria-label="table"><table>', body)
    body = re.sub(r"<th(?=[ >])", '<th scope="col"', body.replace("</table>", "</table></div>"))
    body = re.sub(
        r'<p><img alt="[^"]*" src="([^"]+)" ?/></p>\s*<p><em>(.*?)</em></p>',
        lambda match: _figure(match[1], match[2], folder, alternatives),
        body,
    )
    contents = getattr(converter, "toc", "")
    head, separator, rest = body.partition("<h2")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{head}"
        f'<nav aria-label="contents">{contents}</nav>\n{separator}{rest}\n</main>\n</body>\n</html>\n'
    )


def _figure(name: str, caption: str, folder: Path, alternatives: Mapping[str, str]) -> str:
    content = base64.b64encode((folder / name).read_bytes()).decode()
    text = alternatives[name].replace('"', "&quot;")
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{content}"><figcaption>{caption}</figcaption></figure>'
    )
