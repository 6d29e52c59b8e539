"""Gives the site the pages that stand beside their code, and the files that pages link to, under their paths here."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "datasets/*.md", "llava_piip/**/*.md", "projects/*/*.md")
LINK = re.compile(r"\]\(([^)#:]+)[^):]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces what MkDocs found in `docs` by pages and linked files of the whole repository."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    found = pages | {ROOT / "docs/site.css"} | {path for path in linked if path.is_file() and ROOT in path.parents}
    theme = [file for file in files if Path(config.docs_dir) not in Path(file.abs_src_path).parents]
    return Files([*theme, *(_file(path, config) for path in sorted(found))])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keeps of links to folders their text alone: a site does not list folders."""
    folder = ROOT.joinpath(page.file.src_uri).parent
    return re.sub(
        r"\[([^\]]+)\]\(([^)#:]+)\)", lambda link: link[1] if (folder / link[2]).is_dir() else link[0], markdown
    )


def _file(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
