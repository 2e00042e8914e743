"""A student as a program: logs in, starts a server, gets the labs, runs them, saves them.

Everything goes through the addresses that a browser uses: the hub's pages and REST API, the
Jupyter server's REST API, and a kernel's websocket.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

import nbformat
import requests
import websocket
from nbformat import NotebookNode
from nbformat.v4 import output_from_msg

TIMEOUT = 300  # seconds for any one answer: eight students share two cores


class Student:
    """One student of a hub at `url`. Every method raises requests.HTTPError when refused."""

    def __init__(self, url: str, name: str, password: str):
        self.url, self.name = url, name
        self.server = f"{url}/user/{name}"
        self.web = requests.Session()
        self._log_in(password)

    def _log_in(self, password: str) -> None:
        """Through the login form, then a token of one's own for all that follows."""
        page = f"{self.url}/hub/login"
        self.web.get(page, timeout=TIMEOUT).raise_for_status()
        form = {"username": self.name, "password": password, "_xsrf": self._xsrf()}
        said = self.web.post(page, data=form, allow_redirects=False, timeout=TIMEOUT)
        if said.status_code != 302:
            raise requests.HTTPError(f"{self.name} was not let in", response=said)
        headers = {"X-XSRFToken": self._xsrf()}
        made = self.hub("POST", f"users/{self.name}/tokens", json={}, headers=headers)
        self.web.cookies.clear()
        self.web.headers["Authorization"] = f"token {made.json()['token']}"

    def _xsrf(self) -> str:
        return next(row.value for row in self.web.cookies if row.name == "_xsrf")

    def hub(self, method: str, path: str, **more: Any) -> requests.Response:
        """Ask the hub's REST API."""
        return self._ask(method, f"{self.url}/hub/api/{path}", **more)

    def jupyter(self, method: str, path: str, **more: Any) -> requests.Response:
        """Ask the student's own Jupyter server."""
        return self._ask(method, f"{self.server}/{path}", **more)

    def _ask(self, method: str, address: str, **more: Any) -> requests.Response:
        said = self.web.request(method, address, timeout=TIMEOUT, **more)
        said.raise_for_status()
        return said

    def start(self) -> None:
        """Start the student's server and wait for it. Raises RuntimeError when it fails."""
        self.hub("POST", f"users/{self.name}/server")
        for event in _events(self.hub("GET", f"users/{self.name}/server/progress", stream=True)):
            if event.get("failed"):
                raise RuntimeError(f"the server of {self.name}: {event['message']}")
            if event.get("ready"):
                return

    def stop(self) -> None:
        """Stop the student's server."""
        self.hub("DELETE", f"users/{self.name}/server")

    def pull(self, repository: str) -> None:
        """Make or update the copy of the labs, as nbgitpuller's links do."""
        query = {"repo": repository, "branch": "main", "targetpath": "labs"}
        for event in _events(self.jupyter("GET", "git-pull/api", params=query, stream=True)):
            if event["phase"] == "error":
                raise RuntimeError(f"{self.name} got no labs: {event['message']}")

    def read(self, path: str) -> NotebookNode:
        """A notebook as it is saved."""
        model = self.jupyter("GET", f"api/contents/{quote(path)}").json()
        return nbformat.from_dict(model["content"])

    def save(self, path: str, book: NotebookNode) -> None:
        """Save a notebook."""
        self.jupyter(
            "PUT", f"api/contents/{quote(path)}", json={"type": "notebook", "content": book}
        )

    def run(self, path: str, book: NotebookNode, done: Callable[[int], None]) -> None:
        """Run every code cell of a notebook in a kernel of its session, outputs into `book`.

        done: called with the number of cells that were run, after each.
        Raises RuntimeError with a cell's traceback, ConnectionError when the server is gone.
        """
        with self.kernel(path) as run:
            for number, cell in enumerate((c for c in book.cells if c.cell_type == "code"), 1):
                cell.outputs = run(cell.source)
                cell.execution_count = number
                done(number)

    @contextmanager
    def kernel(self, path: str) -> Iterator[Callable[[str], list[NotebookNode]]]:
        """A notebook's kernel, as a function from code to outputs; shut down at the end."""
        wanted = {"path": path, "type": "notebook", "name": path, "kernel": {"name": "python3"}}
        session = self.jupyter("POST", "api/sessions", json=wanted).json()
        channels = f"api/kernels/{session['kernel']['id']}/channels?session_id={uuid.uuid4().hex}"
        address = f"{self.server}/{channels}"
        header = [f"Authorization: {self.web.headers['Authorization']}"]
        socket = websocket.create_connection(
            address.replace("http", "ws", 1), header=header, timeout=TIMEOUT
        )
        with closing(socket):
            yield lambda code: _run(socket, code)
            self.jupyter("DELETE", f"api/sessions/{session['id']}")


def _run(socket: websocket.WebSocket, code: str) -> list[NotebookNode]:
    """A cell's outputs, as they would be saved."""
    request = _request(code)
    try:
        socket.send(json.dumps(request))
        outputs = [output_from_msg(said) for said in _said(socket, request["header"]["msg_id"])]
    except (websocket.WebSocketException, OSError, ValueError) as error:
        raise ConnectionError(f"the server is gone: {error}") from error
    for output in outputs:
        if output.output_type == "error":
            raise RuntimeError("\n".join(output.traceback))
    return outputs


def _said(socket: websocket.WebSocket, request: str) -> Iterator[dict[str, Any]]:
    """What a kernel shows for a request until it is idle again.

    It is waited for after an error, too: a kernel drops what it is asked before that.
    """
    while True:
        message = json.loads(socket.recv())
        if message["parent_header"].get("msg_id") != request:
            continue
        kind = message["msg_type"]
        if kind in ("stream", "display_data", "execute_result", "error"):
            yield message
        if kind == "status" and message["content"]["execution_state"] == "idle":
            return


def _request(code: str) -> dict[str, Any]:
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "execute_request",
        "session": uuid.uuid4().hex,
        "username": "",
        "version": "5.3",
    }
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    return {
        "header": header,
        "parent_header": {},
        "metadata": {},
        "content": content,
        "channel": "shell",
    }


def _events(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """A stream of server-sent events."""
    for line in answer.iter_lines():
        if line.startswith(b"data:"):
            yield json.loads(line.removeprefix(b"data:"))
