"""Which addresses the demonstration refuses to listen on."""

import socket

import pytest

from lablib.hub.loopback import refusal

HERE = [
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "[::1]",
    "localhost",
    "http://127.0.0.1:8000",
    "http://[::1]:8000/hub/",
    "https://localhost",
    "http+unix://%2Ftmp%2Fhub.sock",
]
ELSEWHERE = [
    "",
    "*",
    "0.0.0.0",
    "::",
    "[::]",
    "192.168.1.20",
    "2001:db8::1",
    "::ffff:192.168.1.20",
    "http://:8000",
    "http://0.0.0.0:8000",
    "http://[::]:8000",
    "https://10.0.0.7/hub/",
    "http://no-such-name.invalid:8000",
]


@pytest.mark.parametrize("address", HERE)
def test_loopback_is_let_be(address):
    assert refusal({"c.JupyterHub.bind_url": address}) is None


@pytest.mark.parametrize("address", ELSEWHERE)
def test_all_else_is_refused_in_one_sentence(address):
    said = refusal({"c.Spawner.ip": "127.0.0.1", "c.JupyterHub.bind_url": address})
    assert f"c.JupyterHub.bind_url is {address!r}" in said and "\n" not in said
    assert "listen on 127.0.0.1, or" in said and "real authenticator" in said


def test_a_name_counts_by_all_that_it_stands_for(monkeypatch):
    def both(host, port, **options):
        assert host == "lab.local"
        rows = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "fe80::1%eth0")]
        return [(family, socket.SOCK_STREAM, 6, "", (found, 0)) for family, found in rows]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert "leads to fe80::1" in refusal({"c.JupyterHub.bind_url": "http://lab.local:8000"})
