"""What the site adds to Sphinx: pages of lablib's code, and links to them from imports."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.fileutil import copy_asset_file

from lablib.papers.scaffold import repository
from lablib.site import code


def code_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page a module: its file's name with a link to the repository, and its lines, numbered."""
    for module in code.modules():
        lines = app.builder.highlighter.highlight_block(
            code.text_of(module), "python", linenos="inline", lineanchors="L", anchorlinenos=True
        )
        file = f"lablib/{code.modules()[module].relative_to(code.PACKAGE).as_posix()}"
        link = f'<a href="{repository()}/blob/main/{file}">in the repository</a>'
        body = f"<h1>{module}</h1><p><code>{file}</code>, {link}</p>{lines}"
        yield code.page(module), {"title": module, "body": body}, "page.html"


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    """Link the imports in a page's code; call a folded cell by the words that it shows."""
    body = context.get("body", "").replace(' aria-label="Toggle hidden content"', "")
    if "lablib" in body:
        body = code.link_imports(body, "../" * page.count("/"))
    if body:
        context["body"] = body


def add_frames(app: Sphinx, config: Config) -> None:
    """Serve the frames that were staged with the sources."""
    config.html_static_path.append(str(Path(app.srcdir) / "_frames"))


def copy_files(app: Sphinx, error: Exception | None) -> None:
    """Put the scripts of other packages beside the site's own."""
    for name, path in app.config.lablib_files.items() if error is None else ():
        copy_asset_file(path, Path(app.outdir) / "_static" / name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    app.add_config_value("lablib_files", {}, "html")
    app.connect("config-inited", add_frames)
    app.connect("html-collect-pages", code_pages)
    app.connect("html-page-context", finish_page)
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
