"""Lets a development command clean up when it is stopped."""

import os
import signal
import threading
import time

POLL_S = 0.5
_ending = threading.Event()


def interrupt_when_asked() -> None:
    """From now on SIGTERM, SIGHUP and the end of the parent process raise KeyboardInterrupt, as Ctrl-C does.

    A signal that was ignored at the start, by nohup for example, stays ignored, except Ctrl-C, which is ignored in every background job.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, _on_signal)
    interrupt_at_the_end_of(os.getppid())


def interrupt_at_the_end_of(parent_pid: int) -> None:
    """From now on the end of the parent process raises KeyboardInterrupt, unless `end_begins` was called.

    Not on Windows, where a process is not informed that its parent has ended.
    """
    if os.name != "nt":
        threading.Thread(target=_interrupt_at_the_end_of, args=(parent_pid,), daemon=True).start()


def end_begins() -> None:
    """The process is cleaning up: the end of its parent no longer interrupts it. (Job managers terminate first, then kill.)"""
    _ending.set()


def _on_signal(_number: int, _frame: object) -> None:
    end_begins()
    raise KeyboardInterrupt


def _interrupt_at_the_end_of(parent_pid: int) -> None:
    # A killed parent cannot pass on a signal.
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    main_thread = threading.main_thread().ident
    assert main_thread is not None, "the main thread is running"
    if not _ending.is_set():
        signal.pthread_kill(main_thread, signal.SIGINT)
