"""The site: it is built without a warning, loads nothing from elsewhere, has a page for each document, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import ROOT, documents

pytestmark = pytest.mark.long
for _package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(_package, reason="make docs")

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The links of a page, what it loads, and the names of its places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.loads, self.names = list[str](), list[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.names.add(value)
            if value and (tag, name) == ("a", "href"):
                self.links.append(value)
            if value and (tag, name) in LOADED:
                self.loads.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_it_has_a_page_for_each_document(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem.lower() for path in documents()} <= pages


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.glob("*.html"):
        assert [target for target in Page(path).loads if urlsplit(target).netloc] == [], path.name
    for path in site.rglob("*.css"):
        assert re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*\)|@import[^;]*", path.read_text()) == [], path.name


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in site.glob("*.html")}
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names | {"__consent", "__search"}, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_every_block_of_code_is_one(site: Path) -> None:
    assert [path.name for path in site.glob("*.html") if "```" in path.read_text()] == []


def test_pictures_follow_the_colours_of_the_page(site: Path) -> None:
    text = (site / "concepts.html").read_text()
    assert text.count("<svg xmlns") >= 5
    assert "prefers-color-scheme: dark) { svg" not in text


def test_the_reference_has_what_the_package_exports(site: Path) -> None:
    names = Page(site / "api.html").names
    wanted = {"run.run", "run.JobResult", "callbacks.Callback", "job.Job.prepare", "job.current_job", "trainer.Trainer.run"}
    assert {each for each in wanted if not any(name.endswith(each) for name in names)} == set()
