"""The secret's file, and who is recognized by what it signs."""

import os

import pytest

from trainer.distributed.authentication import NO_SECRET, Session, make_secret, read_secret
from trainer.errors import ConfigurationError

KEY = b"a secret of a run"


def sessions(key=KEY, *, callee_key=KEY, hello=b"hello", challenge=b"challenge"):
    return (
        Session(key, hello, challenge, caller=True),
        Session(callee_key, hello, challenge, caller=False),
    )


def test_both_ends_recognize_one_another():
    for caller, callee in (sessions(), sessions(b"", callee_key=b"")):
        for content in (b"first", b"second", b"second", b""):
            assert callee.verify(caller.sign(content), content)
            assert caller.verify(callee.sign(content), content)


@pytest.mark.parametrize("other", [b"another secret of a run", b""])
def test_who_has_another_secret_is_not_recognized(other):
    caller, callee = sessions(callee_key=other)
    assert not callee.verify(caller.sign(b"x"), b"x")
    assert not caller.verify(callee.sign(b"x"), b"x")


def test_a_message_is_not_valid_on_another_connection():
    (caller, _), (_, other) = sessions(), sessions(challenge=b"another nonce")
    assert not other.verify(caller.sign(b"x"), b"x")
    (_, callee), (other, _) = sessions(), sessions(hello=b"another nonce")
    assert not other.verify(callee.sign(b"x"), b"x")


def test_a_message_cannot_be_sent_back():
    caller, callee = sessions()
    assert not caller.verify(caller.sign(b"x"), b"x")
    assert not callee.verify(callee.sign(b"x"), b"x")


def test_messages_cannot_be_changed_repeated_dropped_or_swapped():
    caller, callee = sessions()
    assert not callee.verify(caller.sign(b"x"), b"y")
    caller, callee = sessions()
    mac = caller.sign(b"x")
    assert callee.verify(mac, b"x")
    assert not callee.verify(mac, b"x")
    caller, callee = sessions()
    caller.sign(b"x")
    assert not callee.verify(caller.sign(b"x"), b"x")


@pytest.mark.parametrize("mac", [b"", b"x", b"\0" * 32, b"\0" * 1000])
def test_anything_else_is_no_mac(mac):
    assert not sessions()[1].verify(mac, b"x")


def save(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return {"TRAINER_TOKEN_FILE": str(path)}


def test_a_secret_is_made_and_read(tmp_path):
    made = make_secret()
    assert made != make_secret()
    by_value = read_secret({"TRAINER_TOKEN": made, "TRAINER_TOKEN_FILE": "/nowhere"})
    assert by_value == read_secret(save(tmp_path / "secret", made.encode()))
    assert by_value.key == made.encode()
    assert len(made) == 64
    assert by_value.notice == ""
    assert made not in repr(by_value)


def test_a_newline_at_the_end_does_not_count(tmp_path):
    keys = set()
    for name, content in (("one", KEY), ("two", KEY + b"\n"), ("three", b" " + KEY + b"\r\n")):
        (tmp_path / name).write_bytes(content)
        keys.add(read_secret({"TRAINER_TOKEN_FILE": str(tmp_path / name)}).key)
    assert keys == {KEY}


def test_without_the_variable_there_is_none_and_a_notice():
    assert read_secret({}) is NO_SECRET
    assert "whoever reaches their ports can join this run" in NO_SECRET.notice


def test_a_file_that_may_be_missing_is_read_if_it_is_there(tmp_path):
    environ = {"TRAINER_TOKEN_FILE": f"-{tmp_path / 'secret'}"}
    assert read_secret(environ) is NO_SECRET
    save(tmp_path / "secret", KEY)
    assert read_secret(environ).key == KEY
    (tmp_path / "secret").write_text("short")
    with pytest.raises(ConfigurationError, match="5 in"):
        read_secret(environ)


def test_a_secret_that_others_can_read_is_announced(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(KEY)
    path.chmod(0o644)
    notice = read_secret({"TRAINER_TOKEN_FILE": str(path)}).notice
    assert notice == f"Other users can read the secret in {path}: chmod 600."


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "'{path}': No such file or directory"),
        (lambda path: path.mkdir(), "'{path}': Is a directory"),
        (os.mkfifo, "'{path}': no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "'{path}': no regular file"),
        (lambda path: path.write_bytes(b"\n"), "0 in '{path}'"),
        (lambda path: path.write_bytes(b"short\n"), "5 in '{path}'"),
        (lambda path: path.write_bytes(b"x" * 5000), "more than 4096 in '{path}'"),
    ],
)
def test_a_file_without_a_secret_is_refused(tmp_path, make, reason):
    path = tmp_path / "secret"
    make(path)
    with pytest.raises(ConfigurationError) as refused:
        read_secret({"TRAINER_TOKEN_FILE": str(path)})
    assert "Expected TRAINER_TOKEN_FILE to name a file with the secret" in str(refused.value)
    assert f"Received: {reason.format(path=path)}. `openssl" in str(refused.value)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_name_of_no_file_is_refused(path):
    with pytest.raises(ConfigurationError, match="Expected TRAINER_TOKEN_FILE to name a file"):
        read_secret({"TRAINER_TOKEN_FILE": path})


@pytest.mark.parametrize("value", ["", "short"])
def test_a_value_that_is_no_secret_is_refused(value):
    with pytest.raises(ConfigurationError, match=f"Received: {len(value)} in TRAINER_TOKEN."):
        read_secret({"TRAINER_TOKEN": value})
