"""Whether an address that a server would listen on can be reached from other machines."""

import ipaddress
import socket
from urllib.parse import urlsplit

WAY_OUT = (
    "listen on 127.0.0.1, or first give the hub a real authenticator and spawner "
    "(places 1 and 2 of jupyterhub_config.py)"
)


def refusal(places: dict[str, str]) -> str | None:
    """One sentence on the first place that is not this machine's loopback; None when all are.

    places: the setting's name -> an address such as "127.0.0.1" or "http://localhost:8000".
    """
    for name, address in places.items():
        if why := _reached(address):
            return (
                f"the demonstration's login and servers protect nobody on a network, and {name} is "
                f"{address!r}, which {why}: {WAY_OUT}"
            )
    return None


def _reached(address: str) -> str | None:
    """What is wrong with an address; None for one that only this machine reaches."""
    if "://" in address:
        url = urlsplit(address)
        if url.scheme.endswith("+unix"):
            return None  # a file, which the network does not reach
        host = url.hostname or ""
    else:
        host = address.strip("[]")
    if host in ("", "*"):
        return "means every address of this machine"
    others = [found for found in _resolved(host) if not ipaddress.ip_address(found).is_loopback]
    if not others:
        return None
    return "is no loopback address" if others == [host] else f"leads to {others[0]}"


def _resolved(host: str) -> list[str]:
    """Every address that a name stands for; the name itself when nobody knows it."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ["0.0.0.0"]  # a name that may mean anything tomorrow
    return [str(row[4][0]).partition("%")[0] for row in rows]
