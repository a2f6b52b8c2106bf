"""A program that may not use userfaultfd, wholly or but for user-mode faults, as in a container with a seccomp profile."""

from __future__ import annotations

DENIED = """
    import ctypes, struct, sys

    def rule(code, k, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, k)

    LOAD, EQUAL, ANY_BIT, RETURN, EPERM, ALLOW = 0x20, 0x15, 0x45, 0x06, 0x00050001, 0x7FFF0000
    # What a container's seccomp profile does: the ioctl of /dev/userfaultfd and the system call (but for user-mode faults) fail.
    rules = [
        rule(LOAD, 0), rule(EQUAL, 323, 3, 0), rule(EQUAL, 16, 0, 5),
        rule(LOAD, 24), rule(EQUAL, 0xAA00, 2, 3),
        rule(LOAD, 16), rule(ANY_BIT, 1 if sys.argv[1] == "user mode" else 0, 1, 0),
        rule(RETURN, EPERM), rule(RETURN, ALLOW),
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    if libc.prctl(22, 2, program, 0, 0) != 0:
        sys.exit(77)
"""
"""The beginning of a program's code; its first argument is "denied" or "user mode".  Status 77: no seccomp filters here."""
