"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell lets what it starts in the background ignore Ctrl-C, and that is inherited; tests of interrupts need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
