"""What may come from the other end of a connection, before anything uses it."""

import asyncio
import json
import socket

import pytest
from hypothesis import strategies as st
from support import damaged, fuzz

from trainer.distributed.local import free_ports
from trainer.distributed.messages import (
    EXIT_CODES,
    TEXT_LIMIT,
    connect_socket,
    decode,
    listen,
    printable,
)

HELLO = {"hello": 1, "workers": ["a:1", "b:1"], "nonce": "0" * 32, "secret": True}
MESSAGES = [
    HELLO,
    {"challenge": "ab" * 16, "secret": False},
    {"welcome": 1},
    {"busy": "another has joined"},
    {"waiting": "for worker 1"},
    {"heartbeat": 1},
    {"ready": {"seed": 0, "data": {"x": [1, 2.5, None, "y"]}}},
    {"go": 1},
    {"connected": 1},
    {"step": [1, 2]},
    {"trained": 1},
    {"hang": "no step"},
    {"traceback": "Traceback:\n  ..."},
    {"ended": [65, "damaged", "named"]},
    {"ended": [1, "an error", "unclear"]},
    {"ended": [134, "killed by SIGABRT", "crashed"]},
    {"verdict": [0, "", 0]},
    {"verdict": [75, "lost", None]},
]


def message(**values):
    return json.dumps(values).encode()


@pytest.mark.parametrize("values", MESSAGES, ids=lambda values: next(iter(values)))
def test_messages_of_this_program_are_read(values):
    decoded = decode(json.dumps(values).encode())
    assert decoded.keys() == values.keys()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\xff\xfe",
        b"GET / HTTP/1.1\r\n",
        b"1",
        b"null",
        b"[" * 60_000,
        b'{"ready": ' + b'{"a": ' * 5000,
        b"1" * 60_000,
        b"[]",
        b"{}",
        b'{"hello": 1}',
        b'{"unknown": 1}',
        b'{"go": 1, "verdict": [0, "", 0]}',
        *(
            message(**{**HELLO, name: value})
            for name, value in [
                ("hello", "1"),
                ("hello", True),
                ("hello", -1),
                ("hello", 1.0),
                ("hello", 10**30),
                ("hello", [1]),
                ("workers", "a:1,b:1"),
                ("workers", {"a:1": 1, "b:1": 2}),
                ("workers", [1, 2]),
                ("workers", [["a:1"], "b:1"]),
                ("workers", []),
                ("nonce", "0" * 31),
                ("nonce", "x" * 32),
                ("nonce", 0),
                ("secret", "yes"),
                ("more", 1),
            ]
        ),
        message(ready=[]),
        message(ready="settings"),
        b'{"ready": ' + b'{"a": ' * 20 + b"1" + b"}" * 21,
        message(step=1),
        message(step=[1]),
        message(step=["1", "2"]),
        message(step=[-1, 2]),
        b'{"step": [NaN, Infinity]}',
        message(hang=1),
        message(hang=None),
        message(traceback=["a"]),
        message(ended=75),
        message(ended=[]),
        message(ended=[75, "text"]),
        message(ended=[75, "text", "other"]),
        message(ended=["75", "text", "named"]),
        message(ended=[75, None, "named"]),
        message(ended=[99, "no code of this program", "named"]),
        message(ended=[256, "no code", "crashed"]),
        message(ended=[0, "died well", "crashed"]),
        message(verdict=[0]),
        message(verdict=[0, "", None, 1]),
        message(verdict=["0", "", None]),
        message(verdict=[0.0, "", None]),
        message(verdict=[0, {}, None]),
        message(verdict=[0, "", "1"]),
        message(verdict=[-9, "", None]),
        message(verdict=[99, "no code of this program", None]),
        message(go=0),
        message(welcome=[]),
        message(heartbeat="x" * 1000),
        message(connected={}),
    ],
    ids=lambda line: line[:60].decode("latin-1"),
)
def test_nothing_else_is_a_message(line):
    assert decode(line) is None


def test_texts_cannot_steer_a_terminal():
    text = "\x1b]0;title\x07 \x1b[31mred\x9b2J\r\nnext \u202eline\x00"
    for values in ({"verdict": [70, text, None]}, {"ended": [70, text, "named"]}):
        (value,) = decode(json.dumps(values).encode()).values()
        assert value.text.isprintable()
        assert "\\x1b[31mred\\x9b2J next \\u202eline\\x00" in value.text
    for kind in ("busy", "waiting", "hang"):
        assert decode(json.dumps({kind: text}).encode())[kind].isprintable()


def test_texts_are_of_limited_length():
    (value,) = decode(message(busy="x" * 60_000)).values()
    assert value == "x" * TEXT_LIMIT + "…"
    assert printable("ünï 数字") == "ünï 数字"


def check(line):
    """Checks that whatever is decoded has the types and ranges that its users count on."""
    for value in (decode(line) or {}).values():
        text = getattr(value, "text", value)
        if isinstance(text, str) and not line.startswith(b'{"traceback"'):
            assert text == "" or text.isprintable()
            assert len(text) <= 10 * TEXT_LIMIT
        if hasattr(value, "about"):
            assert value.code in EXIT_CODES
        if hasattr(value, "kind"):
            assert 0 <= value.code < 256


@pytest.mark.parametrize("examples", [200, pytest.param(2_000, marks=pytest.mark.full)])
def test_no_damage_makes_a_message_unsafe(examples):
    fuzz(examples, check, damaged([json.dumps(values).encode() for values in MESSAGES]))


@pytest.mark.parametrize("examples", [60, pytest.param(2_000, marks=pytest.mark.full)])
def test_no_json_value_in_a_message_is_unsafe(examples):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=8,
    )
    names = st.sampled_from(sorted({name for values in MESSAGES for name in values}))
    fuzz(
        examples,
        lambda values: check(json.dumps(values).encode()),
        st.dictionaries(names, anything, max_size=4),
    )


@pytest.mark.parametrize(
    ("host", "listens"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", None)],
)
def test_addresses_of_this_machine_alone_are_not_listened_at_from_others(host, listens):
    (port,) = free_ports(1)
    with listen(f"{host}:{port}") as server:
        assert server.getsockname()[0] == (listens or everywhere())


def everywhere():
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_same_holds_for_ipv6():
    (port,) = free_ports(1)
    with listen(f"[::1]:{port}") as server:
        assert server.getsockname()[0] == "::1"


@pytest.mark.parametrize("name", ["a..b", "x" * 70, "digits-0.invalid"])
def test_a_name_that_no_machine_can_have_is_not_resolved(name):
    with pytest.raises(socket.gaierror):
        asyncio.run(connect_socket(f"{name}:2222"))
