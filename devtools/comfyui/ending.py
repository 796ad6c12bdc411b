"""Stopping a development command: it can clean up however it is stopped."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

POLL_S = 0.5
_ending = threading.Event()


def interrupt_when_asked() -> None:
    """Make SIGTERM, a closed terminal and the end of the parent process raise KeyboardInterrupt, as Ctrl-C does.

    A signal that is ignored at the start (by nohup, for example) stays ignored, except Ctrl-C, which shells ignore in background jobs.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, _on_signal)
    interrupt_at_the_end_of(os.getppid())


def run_to_its_end(work: Callable[[], object], when_stopped: str = "") -> None:
    """Run a command's work. An expected failure ends the process with its message, a stop with status 130 and `when_stopped`."""
    interrupt_when_asked()
    try:
        work()
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        if when_stopped:
            print(f"\n{when_stopped}", file=sys.stderr)
        sys.exit(130)


def interrupt_at_the_end_of(parent_pid: int) -> None:
    """Make the end of the parent process raise KeyboardInterrupt, unless `end_begins` was called before.

    Has no effect on Windows, where a process cannot see that its parent ended.
    """
    if os.name != "nt":
        threading.Thread(target=_interrupt_at_the_end_of, args=(parent_pid,), daemon=True).start()


def end_begins() -> None:
    """The process is cleaning up: do not interrupt it when its parent ends too, since job managers terminate first and kill later."""
    _ending.set()


def _on_signal(_number: int, _frame: object) -> None:
    end_begins()
    raise KeyboardInterrupt


def _interrupt_at_the_end_of(parent_pid: int) -> None:
    # A parent that is killed cannot pass a signal on.
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    main_thread = threading.main_thread().ident
    assert main_thread is not None, "the main thread is running"
    if not _ending.is_set():
        signal.pthread_kill(main_thread, signal.SIGINT)
