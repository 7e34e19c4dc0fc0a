r"""A limit on the time of comparing expressions, which holds in any thread.

sympy can work on \boxed{2003^{2002^{2001}}} for ever, in one operation that no signal and no other thread can stop.
So expressions are compared in a child process, which starts at the first comparison, serves all threads of this one,
and is killed when it takes longer than the limit; the next comparison starts another.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from stepsal.tasks.math_child import MARK

SECONDS = 5.0
"""Limit for reading and comparing one expression."""
START_SECONDS = 120.0
"""Limit for the start of the child process, which imports sympy."""
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from stepsal.tasks.math_child import main; main()"


class Comparison(NamedTuple):
    """The result of comparing an expression with references.

    Attributes:
        text: the expression in a form in which equal ones mostly look the same; None if there is none.
        same: for each reference, the expression equals it.
        problem: what kept the comparison from ending, in words; None if nothing did.
    """

    text: str | None
    same: tuple[bool, ...]
    problem: str | None = None


def compare(stated: str, references: tuple[str, ...], *, boxed: bool = True) -> Comparison:
    r"""Compare an expression with references by math-verify.

    Args:
        stated: LaTeX of the expression, or prose, of which the last expression counts.
        references: LaTeX of the references.
        boxed: `stated` is an expression.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process that compares does not start.

    Example:
        >>> from stepsal.tasks.math_process import compare
        >>> compare("0.75", (r"\frac{3}{4}", "4"))
        Comparison(text='0.750000000000000', same=(True, False), problem=None)
    """
    return _CHILD.compare(stated, references, boxed=boxed)


class _Child:
    """The child process, and the lock that gives it to one thread at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, stated: str, references: tuple[str, ...], *, boxed: bool) -> Comparison:
        """Send a request and wait for the reply, at most `SECONDS`."""
        request = {"stated": stated, "references": references, "boxed": boxed, "seconds": SECONDS}
        none = (False,) * len(references)
        with self.lock:
            try:
                process = self._running()
                reply, is_late = _exchange(process, request, SECONDS)
            except BaseException:  # such as a KeyboardInterrupt: a late reply must not answer the next request
                self.end()
                raise
            if reply is None:
                self.end()
        if reply is None:
            late = f"is not read and compared within {SECONDS:g} seconds"
            return Comparison(None, none, late if is_late else "ends the process that compares it")
        if "error" in reply:
            return Comparison(None, none, f"can't be compared ({reply['error']})")
        return Comparison(reply["text"], tuple(reply["same"]))

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, started anew where it has ended."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("grading mathematics needs pip install 'stepsal[math]'")
        self.end()
        command = [sys.executable, "-c", _PROGRAM, *(path or os.getcwd() for path in sys.path)]
        # a session of its own: an interrupt at the keyboard is for this process, which then ends the child
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        reply, _ = _exchange(self.process, None, START_SECONDS)
        if reply is None or "error" in reply:
            what = "" if reply is None else f" ({reply['error']})"
            raise RuntimeError(f"the process that compares expressions does not start{what}: {' '.join(command[:2])}")
        return self.process

    def end(self) -> None:
        """Kill the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            _close(process)

    def forget(self) -> None:
        """Leave the process to the parent of this one, which was forked: it gets a process of its own."""
        self.lock = threading.Lock()
        if self.process is not None:
            _close(self.process)
            self.process.returncode = 0  # no warning that it still runs
            self.process = None


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float
) -> tuple[dict[str, Any] | None, bool]:
    """Send a request, if there is one, and wait for the reply.

    Returns:
        The reply, or None for a process that ended; and whether it ended because of the limit.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            _write(process.stdin.fileno(), json.dumps(request).encode() + b"\n")
        line = _line(process.stdout.fileno())
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
        timer.join()  # a limit that has just passed kills before the next request, not during it
    reply = json.loads(line.removeprefix(MARK.encode())) if line and not is_late.is_set() else None
    return reply, is_late.is_set()


def _write(pipe: int, data: bytes) -> None:
    """Write all of the data to a pipe, which takes a part at a time."""
    while data:
        data = data[os.write(pipe, data) :]


def _line(pipe: int) -> bytes:
    """Read a reply from a pipe, past lines that are none; nothing if it ends before the reply does."""
    data = b""
    while not (data.endswith(b"\n") and (line := data.splitlines()[-1]).startswith(MARK.encode())):
        if not (part := os.read(pipe, 1 << 16)):
            return b""
        data += part
    return line


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close this side of the pipes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


_CHILD = _Child()
atexit.register(_CHILD.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_CHILD.forget)
