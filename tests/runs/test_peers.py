"""A process that loses another one of its run ends, and says so once."""

import socket
import threading

import pytest

from lensjax.runs.engine import peers


def test_a_process_that_is_alone_watches_nobody_and_goes_on():
    peers.watch(lambda: pytest.fail("nobody can die"))
    assert peers._connections == []
    peers.leave(1, "error: not said")


@pytest.fixture
def two(monkeypatch):
    """Connections to two others, and what this process says as it ends."""
    pairs = [socket.socketpair() for _ in range(2)]
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(peers, "_connections", [ours for ours, _ in pairs])
    monkeypatch.setattr(peers, "leave", lambda code, line: said.append((code, line)))
    yield [theirs for _, theirs in pairs], said
    for pair in pairs:
        for one in pair:
            one.close()


def test_who_ends_in_time_says_goodbye_and_is_not_missed(two):
    others, said = two
    for other in others:
        other.sendall(peers._BYE)
        other.close()
    peers._listen(lambda: "missed")
    assert said == []
    peers._say_goodbye()  # to nobody: they are gone


def test_who_dies_is_missed_while_another_goes_on(two):
    others, said = two
    others[1].close()
    listening = threading.Thread(target=peers._listen, args=(lambda: "missed",))
    listening.start()
    others[0].sendall(peers._BYE)
    listening.join(10)
    assert not listening.is_alive() and said == [(1, "missed")]


def test_all_find_each_other_on_the_port_above(monkeypatch):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    monkeypatch.setattr(peers.jax, "process_count", lambda: 3)
    accepted: list[socket.socket] = []
    first = threading.Thread(target=lambda: accepted.extend(peers._accepted(port)))
    first.start()
    others = [peers._connected("localhost", port) for _ in range(2)]
    first.join(10)
    assert len(accepted) == 2
    for other in others:
        other.sendall(b"a")
    assert [one.recv(1) for one in accepted] == [b"a", b"a"]
    for one in (*others, *accepted):
        one.close()
