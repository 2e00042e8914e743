"""`make hub`: a JupyterHub with the labs on this machine, until Ctrl-C."""

import argparse
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from lablib.course import fence
from lablib.hub.running import Hub, hub


def main() -> int:
    """Start the hub, say how to get in, wait; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lablib.hub", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/hub"), metavar="FOLDER")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # or a closed terminal
        signal.signal(number, signal.default_int_handler)
    try:
        _check(options.port)
        with hub(options.state, options.port) as running, suppress(KeyboardInterrupt):
            print(welcome(running), flush=True)
            return running.process.wait()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it was up
        return 130
    print("stopped; students' files stay in", options.state / "users")
    return 0


def welcome(running: Hub) -> str:
    """The address, a name, the password, and what keeps students apart."""
    apart = (
        "students cannot read each other's files"
        if fence.available()
        else "without Landlock (Linux 5.13) students can read each other's files"
    )
    return (
        f"JupyterHub: {running.url}\n"
        f"  user:     student   (any name: letters, digits and -)\n"
        f"  password: {running.password}\n"
        f"A demonstration, for this machine alone; {apart}. Log: {running.log}\n"
        "Ctrl-C stops it and all its servers."
    )


def _check(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise RuntimeError(
                f"port {port} is in use: stop what listens there, or `make hub PORT={port + 10}`"
            ) from None


if __name__ == "__main__":
    sys.exit(main())
