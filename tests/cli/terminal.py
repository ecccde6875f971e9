"""A terminal with someone at it, for commands that behave otherwise there."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import environment


class Terminal:
    """Runs `bdh ARGS…`, or another program, on a pseudo-terminal of its own.

    Attributes:
        seen: What was shown and not yet expected.
    """

    def __init__(
        self, *argv: object, cwd: Path, program: Sequence[str] = (sys.executable, "-m", "bdh"), **variables: str
    ):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))

        def become_its_session() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to it
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run with & ignores it

        self.process = subprocess.Popen(
            [*program, *map(str, argv)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", HOME=str(cwd), **variables),
            start_new_session=True,
            preexec_fn=become_its_session,
        )
        os.close(theirs)
        self.screen = ours
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Waits until this regular expression is shown; returns everything up to its end."""
        until = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert self._read(until - time.monotonic()), f"{pattern} is not in {self.seen!r}"
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Waits until the command ends; its exit code, and what it showed last."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass
        code = self.process.wait(timeout=10)
        os.close(self.screen)
        return code, self.seen

    def _read(self, seconds: float) -> bool:
        """Takes what is shown next; whether anything was."""
        if not select.select([self.screen], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.screen, 65536)
        except OSError:  # nobody is at the other end any more
            return False
        self.seen += self.decoder.decode(data)
        return bool(data)
