"""How a development command ends early: whoever stops it, it may clean up."""

import os
import signal
import threading
import time

POLL_S = 0.5


def interrupt_when_asked() -> None:
    """From now on a termination, a closed terminal and the end of the parent process raise KeyboardInterrupt, as Ctrl-C does.

    A signal that was ignored at the start (by nohup, say) stays so, except Ctrl-C, which is ignored in every job of a script's background.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, signal.default_int_handler)
    interrupt_at_the_end_of_the_parent()


def interrupt_at_the_end_of_the_parent() -> None:
    """From now on the end of the parent process raises KeyboardInterrupt (not on Windows, where a child does not see it)."""
    if os.name != "nt":
        threading.Thread(target=_interrupt_at_the_end_of, args=(os.getppid(),), daemon=True).start()


def _interrupt_at_the_end_of(parent_pid: int) -> None:
    # A parent that is killed can pass nothing on.
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    main_thread = threading.main_thread().ident
    assert main_thread is not None, "it runs"
    signal.pthread_kill(main_thread, signal.SIGINT)
