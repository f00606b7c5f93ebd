"""Ports for servers that start later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mora_serve import free_ports as module
from mora_serve.free_ports import FIRST, LAST, free_port, free_ports, stable_ports


def test_ports_are_distinct_and_can_be_bound() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_ports(2)
    monkeypatch.setattr(module, "stable_ports", lambda: [taken, free])
    with socket.socket() as server:
        server.bind(("127.0.0.2", taken))
        server.listen()
        assert {free_port() for _ in range(8)} == {free}


def test_more_ports_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    only = free_port()
    monkeypatch.setattr(module, "stable_ports", lambda: [only])
    with pytest.raises(OSError, match="no 2 free ports among 1"):
        free_ports(2)


def test_ephemeral_ports_are_left_to_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("32768\t60999\n")
    ports = stable_ports(tmp_path / "range")
    assert min(ports) == FIRST
    assert max(ports) == LAST
    assert not set(ports) & set(range(32768, 61000))


@pytest.mark.parametrize("text", ["1024 65535", "", "no numbers"])
def test_range_that_leaves_nothing_or_is_unknown_allows_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "range").write_text(text)
    assert stable_ports(tmp_path / "range") == list(range(FIRST, LAST + 1))
    assert stable_ports(tmp_path / "absent") == list(range(FIRST, LAST + 1))
