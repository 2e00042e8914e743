"""A clean copy of a lab beside the one that a student has edited: a button of JupyterLab.

A Jupyter server extension; the button itself is in jupyter/labextensions/lablib.
"""

import asyncio
import contextlib
import re
from itertools import count
from pathlib import Path

from lablib.files import atomic_write
from lablib.hub.publish import git

MARK = re.compile(r"-clean(-\d+)?$")


def clean_copy(notebook: Path) -> Path:
    """Write the course's newest version of a notebook beside it, under a name that is free.

    notebook: in a student's copy of the labs, edited, deleted, or a clean copy itself. The course
    is asked for updates first; without a network its last known version is taken.
    Raises FileNotFoundError when the course has no such notebook.
    """
    stem = MARK.sub("", notebook.stem)
    try:
        prefix = git("rev-parse", "--show-prefix", folder=notebook.parent).strip()
        with contextlib.suppress(RuntimeError):
            git("fetch", "--quiet", folder=notebook.parent)
        name = f"{prefix}{stem}{notebook.suffix}"
        text = git("show", f"@{{upstream}}:{name}", folder=notebook.parent)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{notebook.name} is no lab of this course, so there is no clean copy of it: "
            "open one of the labs and ask there"
        ) from error
    place = _free(notebook.with_name(f"{stem}-clean{notebook.suffix}"))
    with atomic_write(place) as temporary:
        temporary.write_text(text, "utf-8")
    return place


def _free(path: Path) -> Path:
    if not path.exists():
        return path
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server) -> None:
    from jupyter_server.base.handlers import APIHandler
    from jupyter_server.utils import url_path_join
    from tornado import web

    class CleanCopy(APIHandler):
        @web.authenticated
        async def post(self):
            contents = self.contents_manager
            path = self.get_json_body()["path"]
            try:
                place = await asyncio.to_thread(clean_copy, Path(contents._get_os_path(path)))
            except FileNotFoundError as error:
                raise web.HTTPError(404, str(error)) from None
            folder, _, _ = path.rpartition("/")
            self.finish({"path": f"{folder}/{place.name}".lstrip("/")})

    address = url_path_join(server.web_app.settings["base_url"], "lablib", "clean-copy")
    server.web_app.add_handlers(".*$", [(address, CleanCopy)])
