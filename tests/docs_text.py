"""The pages as a reader meets them: sentences, tables, commands, links."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def without_code(text):
    """The text without fenced blocks and comments; code within a line counts as one word."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.S)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text):
    """Sentences of paragraphs, list items, headings and table cells, with the targets of links left out.

    A sentence ends at . ! or ? before a space, and with its block: a colon or a semicolon does not end it.
    """
    blocks, paragraph = [], []
    for line in [*without_code(text).splitlines(), ""]:
        line = _LINK.sub(r"\1", line.strip().removeprefix("> "))
        if line.startswith("|"):
            blocks += re.split(r"(?<!\\)\|", line)
        elif not line or re.match(r"([-*]|\d+\.|#+) ", line):
            blocks.append(" ".join(paragraph))
            paragraph = [re.sub(r"^([-*]|\d+\.|#+) ", "", line)]
        else:
            paragraph.append(line)
    blocks.append(" ".join(paragraph))
    found = [part.strip() for block in blocks for part in re.split(r"(?<=[.!?])\**\s+", block)]
    return [sentence for sentence in found if words(sentence)]


def words(sentence):
    """Words of a sentence: what spaces part, if it has a letter or a digit."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def code(text):
    """Fenced lines and code within lines, one string each."""
    fenced = [line for block in _FENCE.findall(text) for line in block.splitlines()[1:-1]]
    return [*fenced, *re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))]


def links(text):
    """Targets of links and pictures."""
    return [target for _, target in _LINK.findall(_FENCE.sub("", text))]


def table_after(text, mark):
    """Rows of the table behind the comment `<!-- mark: ... -->` as lists of cells, without the header."""
    lines = text[re.search(rf"<!-- {mark}:[^>]*-->\n+", text).end() :].splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]
