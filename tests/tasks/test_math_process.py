"""The child process that compares expressions: its limit holds in any thread, and it does not outlive its parent."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepsal.tasks import math_process
from stepsal.tasks.answers import Problem

TOWER = r"\boxed{2003^{2002^{2001}}}"
HALF = (r"\frac{1}{2}", "2")


@pytest.mark.slow
def test_a_tower_of_powers_ends_with_a_verdict_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("?", "5", "math")
    monkeypatch.setattr(math_process, "SECONDS", 0.5)
    verdicts = []
    for grade in (problem.grade, lambda text: ThreadPoolExecutor(1).submit(problem.grade, text).result()):
        start = time.monotonic()
        verdicts.append(grade(TOWER))
        assert time.monotonic() - start < 30
    for verdict in verdicts:
        assert (verdict.correct, verdict.error) == (False, "not compared")
        assert verdict.reason == "2003^{2002^{2001}} is not read and compared within 0.5 seconds"
    monkeypatch.undo()
    assert problem.grade(r"\boxed{\frac{10}{2}}").correct  # by another process


def test_a_reference_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    math_process.compare("0.5", HALF)  # started
    monkeypatch.setattr(math_process, "SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"can't be read by grader='math': it is not read .* within 0\.5 seconds"):
        Problem("?", "1+2003^{2002^{2001}}", "math")


def test_many_threads_get_their_own_replies() -> None:
    def compare(i: int) -> bool:
        return math_process.compare(rf"\frac{{{2 * i}}}{{2}}", (str(i), str(i + 1))).same == (True, False)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(compare, range(40)))


def test_a_process_that_was_killed_is_replaced() -> None:
    math_process.compare("0.5", HALF)
    process = math_process._CHILD.process
    assert process is not None
    process.kill()
    process.wait()
    assert math_process.compare("0.5", HALF).same == (True, False)
    assert math_process._CHILD.process is not process


def test_an_expression_that_ends_the_process_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    math_process.compare("0.5", HALF)
    process = math_process._CHILD.process
    assert process is not None
    exchange = math_process._exchange

    def killed(child: subprocess.Popen[bytes], request: object, seconds: float) -> object:
        child.kill()
        return exchange(child, request, seconds)

    monkeypatch.setattr(math_process, "_exchange", killed)
    assert math_process.compare("0.5", HALF) == (None, (False, False), "ends the process that compares it")


PROGRAM = """
import os
from stepsal.tasks import math_process
assert math_process.compare("0.5", ("1/2",)).same == (True,)
first = math_process._CHILD.process.pid
if hasattr(os, "fork"):
    pid = os.fork()
    if pid == 0:
        assert math_process.compare("0.5", ("1/2",)).same == (True,)
        assert math_process._CHILD.process.pid != first
        math_process._CHILD.end()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
assert math_process.compare("0.5", ("1/2",)).same == (True,)
print(math_process._CHILD.process.pid)
"""


@pytest.mark.slow
def test_a_fork_gets_its_own_process_and_none_is_left_at_the_end() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)


INTERRUPTED = """
from stepsal.tasks import math_process
math_process.compare("0.5", ("1/2",))
print(math_process._CHILD.process.pid, flush=True)
math_process.SECONDS = 60
math_process.compare("2003^{2002^{2001}}", ("1",))
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_process_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        time.sleep(0.5)  # it is busy
        run.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in run.communicate(timeout=30)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_other_lines_than_replies_are_passed_over() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a warning\nstepsal{}\n")
    assert math_process._line(reading) == b"stepsal{}"
    os.write(writing, b"no end")
    os.close(writing)
    assert math_process._line(reading) == b""
    os.close(reading)


def test_without_math_verify_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    monkeypatch.setattr(math_process, "_CHILD", math_process._Child())
    with pytest.raises(ImportError, match=r"pip install 'stepsal\[math\]'"):
        math_process.compare("0.5", HALF)


def test_the_limit_leaves_no_thread() -> None:
    n_threads = threading.active_count()
    math_process.compare("0.5", HALF)
    assert threading.active_count() == n_threads
