"""mkdocs hooks: links of the repository's plain Markdown as links of the site, and pictures that follow the site's colours.

A page may link to any file of the repository (`../README.md`, `../examples/plain.py`). The README is a page of the site; other files
outside docs/ are copied. A picture `![...](images/NAME.svg)` becomes part of the page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
README = "readme.md"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)?(#[^)\s]*)?\)")
_PICTURE = re.compile(r"^!\[([^\]]*)\]\((images/[\w-]+\.svg)\)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w+) ([^\n]+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$|``.*?``|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the README, and the files outside docs/ that pages link to."""
    files.append(File.generated(config, README, content=(ROOT / "README.md").read_text()))
    for page in files.documentation_pages():
        for target in _targets(page.content_string, page.src_uri):
            inside = site_path(target, page.src_uri)
            if files.get_file_from_path(inside) is None and (ROOT / inside).is_file():
                files.append(File.generated(config, inside, content=(ROOT / inside).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replaces links and pictures."""
    own = page.file.src_uri
    markdown = outside_code(markdown, lambda text: _LINK.sub(lambda found: _linked(found, own), text))
    markdown = _PICTURE.sub(lambda found: _inline(found[1], ROOT / "docs" / found[2]), markdown)
    return _FENCE.sub(_opened, markdown)


def site_path(target: str, page: str) -> str:
    """Returns where a link of the repository leads, as a path of the site: below docs/, or for other files below the repository."""
    where = posixpath.normpath(posixpath.join("." if page == README else "docs", target))
    return README if where == "README.md" else where.removeprefix("docs/")


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Returns the text with everything but blocks and spans of code changed."""
    parts, at = list[str](), 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, change(markdown[at:])])


def _targets(markdown: str, page: str) -> list[str]:
    found = list[str]()
    outside_code(markdown, lambda text: found.extend(each[2] for each in _LINK.finditer(text) if _local(each[2])) or text)
    return found


def _local(target: str | None) -> bool:
    return target is not None and ":" not in target


def _linked(found: re.Match[str], page: str) -> str:
    if not _local(found[2]):
        return found[0]
    return f"{found[1]}{site_path(found[2], page)}{found[3] or ''})"


def _inline(words: str, path: Path) -> str:
    drawing = re.sub(r"<style>.*?</style>\s*", "", path.read_text(), flags=re.DOTALL).replace("\n\n", "\n")
    return f'<figure class="drawing" role="img" aria-label="{words}">{drawing}</figure>'


def _opened(fence: re.Match[str]) -> str:
    """Returns the first line of a block with a title instead of the words that are for tests."""
    file = re.search(r"\bfile=(\S+)", fence[2])
    title = file[1] if file else "before" if "other" in fence[2] else "with elastic" if "job=" in fence[2] else ""
    return f"```{fence[1]}" + (f' title="{title}"' if title else "")
