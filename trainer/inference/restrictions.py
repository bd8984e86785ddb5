"""What a process gives up before it reads a file of unknown origin.

    import everything
    restrictions.apply()        # no file, no socket, no other program from here on

Four layers, any of which is enough against most of what code in a damaged file could want; one that
the system does not have, or a container does not allow, is left out:

- no new privileges (Linux): a setuid program gives none (``man 2 PR_SET_NO_NEW_PRIVS``);
- limits (Linux, macOS): no further open file or socket, no writing to files;
- Landlock (Linux 5.13, ABI 1 to 7): no file, no TCP port, no signal to other processes
  (https://docs.kernel.org/userspace-api/landlock.html);
- seccomp (Linux on x86-64 and AArch64): the system calls that computing takes, and no other: no
  programs, processes, sockets, files, debugging (``man 2 seccomp``).
"""

import codecs
import ctypes
import errno
import os
import platform
import struct
import sys

try:
    import resource
except ImportError:  # Windows has no limits.
    resource = None  # type: ignore[assignment]

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22  # of <linux/prctl.h>
_SECCOMP_MODE_FILTER = 2

# The numbers of Landlock's system calls are the same on all architectures.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1

# System calls by their numbers on x86-64 and AArch64 (<asm/unistd.h>); None: it has none.
SYSTEM_CALLS: dict[str, tuple[int, int | None]] = {
    # Files that are open: the pipes to the parent, a model's file.
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    # Memory.
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # Threads: decoders of AVIF and HEIC start some.
    "sched_yield": (24, 124),
    "exit": (60, 93),
    "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "prctl": (157, 167),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "membarrier": (324, 283),
    "rseq": (334, 293),
    # Signals to itself, time, chance, and what it has used.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "sigaltstack": (131, 132),
    "time": (201, None),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "getrandom": (318, 278),
}

# Those whose first argument decides: a thread but not a process; limits of this process alone.
CONDITIONAL_CALLS = {"clone": (56, 220), "prlimit64": (302, 261)}
_CLONE_THREAD, _THIS_PROCESS = 0x10000, 0

_AUDIT_ARCH_X86_64, _AUDIT_ARCH_AARCH64 = 0xC000003E, 0xC00000B7

# Instructions of <linux/bpf_common.h>, and where in struct seccomp_data they look.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
# SECCOMP_RET_ERRNO with ENOSYS, at which a C library does without the call, as on an older kernel.
_REFUSE = 0x00050000 | errno.ENOSYS


def apply() -> None:
    """Applies all layers to this process, which has one thread, for good."""
    for codec in ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        codecs.lookup(codec)  # Each is a module, imported at its first use.
    for layer in (no_new_privileges, landlock, limits, seccomp):
        layer()


def no_new_privileges() -> bool:
    """Returns whether it is applied, as the other layers do."""
    return sys.platform == "linux" and not _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def landlock() -> bool:
    """Handles every access that this kernel's Landlock knows, and has no rule that allows one."""
    if (abi := landlock_abi()) < 1:
        return False
    files = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # Kinds of access.
    attributes = struct.pack("=Q", 2**files - 1)
    if abi >= 4:
        attributes += struct.pack("=Q", 3)  # Binding and connecting TCP ports.
    if abi >= 6:
        attributes += struct.pack("=Q", 3)  # Abstract Unix sockets and signals outside.
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        return not _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def landlock_abi() -> int:
    """Returns the version of Landlock that this kernel has and allows; less than 1: none."""
    if sys.platform != "linux":
        return 0
    return _syscall(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_CREATE_RULESET_VERSION)


def limits() -> bool:
    """Limits open files to those there are, and the size of files to none."""
    if resource is None:
        return False
    kinds = [resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE]
    # Elsewhere it counts threads, and those of all the user's processes; there is seccomp.
    if sys.platform == "darwin":
        kinds.append(resource.RLIMIT_NPROC)
    applied = True
    for kind in kinds:
        try:
            resource.setrlimit(kind, (0, 0))
        except (ValueError, OSError):
            applied = False
    return applied


def seccomp() -> bool:
    """Refuses every system call but ``SYSTEM_CALLS``, and threads."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    program = _program()
    code = ctypes.create_string_buffer(program)
    # struct sock_fprog
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    return not _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described)


def _program() -> bytes:
    """Returns the filter: of both architectures, for x86-64's programs can run on AArch64."""
    instructions = [_instruction(_LOAD, _ARCHITECTURE)]
    for at, architecture in enumerate((_AUDIT_ARCH_X86_64, _AUDIT_ARCH_AARCH64)):
        section = [_instruction(_LOAD, _NUMBER)]
        for numbers in SYSTEM_CALLS.values():
            if (number := numbers[at]) is not None:
                section += [
                    _instruction(_JUMP_IF_EQUAL, number, otherwise=1),
                    _instruction(_RETURN, _ALLOW),
                ]
        for name, jump, value in (
            ("clone", _JUMP_IF_ANY, _CLONE_THREAD),
            ("prlimit64", _JUMP_IF_EQUAL, _THIS_PROCESS),
        ):
            section += [
                _instruction(_JUMP_IF_EQUAL, CONDITIONAL_CALLS[name][at], otherwise=4),
                _instruction(_LOAD, _FIRST_ARGUMENT),
                _instruction(jump, value, otherwise=1),
                _instruction(_RETURN, _ALLOW),
                _instruction(_RETURN, _REFUSE),
            ]
        section.append(_instruction(_RETURN, _REFUSE))
        instructions.append(_instruction(_JUMP_IF_EQUAL, architecture, otherwise=len(section)))
        instructions += section
    return b"".join([*instructions, _instruction(_RETURN, _REFUSE)])


def _instruction(code: int, value: int, *, otherwise: int = 0) -> bytes:
    """Returns a struct sock_filter; a jump skips as many instructions where it does not hold."""
    return struct.pack("=HBBI", code, 0, otherwise, value)


def _prctl(option: int, *arguments: int | bytes) -> int:
    # Variadic: each argument is passed as an unsigned long.
    values = [ctypes.c_ulong(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    zeros = [ctypes.c_ulong(0)] * (4 - len(values))
    return ctypes.CDLL(None).prctl(option, *values, *zeros)


def _syscall(number: int, *arguments: int | bytes) -> int:
    values = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return syscall(ctypes.c_long(number), *values)
