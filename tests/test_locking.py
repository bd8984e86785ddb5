"""One run in a folder, also where the file system has no locks."""

import errno

import pytest

from trainer import locking
from trainer.errors import OutputError
from trainer.locking import LEASE_FILE, LEASE_SECONDS, Lease, hold_lock


class Time:
    """A clock that moves when somebody sleeps; ``meanwhile`` is what happens then."""

    def __init__(self, meanwhile=lambda: None):
        self.now = 0.0
        self.meanwhile = meanwhile

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


def lease(folder, meanwhile=lambda: None):
    time = Time(meanwhile)
    return Lease(folder, clock=time.clock, sleep=time.sleep), time


@pytest.fixture
def without_locks(monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    monkeypatch.setattr(locking, "RENEW_SECONDS", 0.01)


def test_without_locks_two_runs_cannot_use_one_folder(tmp_path, without_locks):
    with (
        hold_lock(tmp_path),
        pytest.raises(OutputError, match="no other run is using"),
        hold_lock(tmp_path),
    ):
        pytest.fail("the folder was taken twice")
    with hold_lock(tmp_path):
        pass  # and afterwards it is free again
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_renewed_is_not_taken(tmp_path):
    holder, _ = lease(tmp_path)
    assert holder.acquire()
    other, time = lease(tmp_path, meanwhile=lambda: holder.renew())
    assert not other.acquire()
    assert time.now < LEASE_SECONDS
    assert not other.acquire(wait=300)
    assert time.now >= 300


def test_a_lease_whose_holder_was_killed_is_taken_after_a_while(tmp_path):
    killed, _ = lease(tmp_path)
    assert killed.acquire()
    other, time = lease(tmp_path)
    assert other.acquire()
    assert time.now >= LEASE_SECONDS
    content = (tmp_path / LEASE_FILE).read_text()
    killed.renew()  # It was only frozen: it takes nothing back, and gives nothing away.
    killed.release()
    assert (tmp_path / LEASE_FILE).read_text() == content
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_wait_for_a_dead_holder_one_gets_the_lease(tmp_path):
    killed, _ = lease(tmp_path)
    assert killed.acquire()
    faster, _ = lease(tmp_path)
    slower, time = lease(tmp_path)

    def overtake():
        # When the slower one has seen the same content for long enough, the faster one has it.
        if time.now >= LEASE_SECONDS:
            if faster.renewals == 0:
                faster.acquire()
            faster.renew()

    time.meanwhile = overtake
    assert not slower.acquire()
    assert (tmp_path / LEASE_FILE).read_text().startswith(faster.token)
