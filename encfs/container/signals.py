"""Wait for a process and pass signals on to it, as its parent or as the first process of a pid namespace."""

from __future__ import annotations

import os
import signal

#: Passed on where a process sent them. What the terminal sends, it sends to the command as well.
PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
)
#: The terminal stops the command; whoever waits for it goes on waiting.
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_ALL = {signal.SIGCHLD, *PASSED_ON, *_STOPS}


def block_signals() -> set[int]:
    """Keep what `wait_for` waits for; the mask before. Before a process is made, so that nothing is lost."""
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)}


def wait_for(pid: int) -> int:
    """Wait until a child ends, burying others, and pass signals on: its wait status (waitpid(2))."""
    while True:
        info = signal.sigwaitinfo(_ALL)
        if info.si_signo == signal.SIGCHLD:
            status = _bury(pid)
            if status is not None:
                return status
        elif info.si_code <= 0 and info.si_signo in PASSED_ON:
            os.kill(pid, info.si_signo)


def _bury(pid: int) -> int | None:
    """Reap whoever has ended; the status of `pid` if it was among them."""
    found = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended == pid:
            found = status


def exit_code(status: int) -> int:
    """As shells have it: 128 + N for signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
