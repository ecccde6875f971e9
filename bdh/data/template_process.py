"""Renders the chat template of a model in a process of its own: `python -m bdh.data.template_process`.

A chat template comes with the model, from wherever that came from, and is a program: it may loop for hours, in one call
of C code that no other thread can interrupt, or take all memory. The process therefore has limits that the operating
system enforces, and a process that exceeds one is replaced by another.

Messages in both directions are lines of JSON: what the template writes is data here, whatever it manages to do there.
"""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bdh.errors import BDHError, one_line

log = logging.getLogger("bdh.data.template_process")  # whatever it is called when it is run

CPU_SECONDS = 2.0  # per conversation; one of 4 MB takes some tenths of a second
WALL_SECONDS = 20.0  # on a machine that has no core free for it
MAX_MEMORY_BYTES = 512 << 20  # in addition to what the process has once it is ready
TEXT_CHARACTERS, TEXT_GROWTH = 1 << 20, 4  # the text may have this many more characters than 4 times the messages
ENDING_SECONDS = 2.0


class TemplateProcess:
    """Renders one chat template in another process, within limits on time and memory. For any thread.

    Args:
        template: Source of the Jinja template.
        variables: The tokenizer's special tokens, which the template may use.
        cpu_seconds: Limit on the processor time of one conversation.
    """

    def __init__(self, template: str, variables: Mapping[str, Any], cpu_seconds: float = CPU_SECONDS):
        self.cpu_seconds = cpu_seconds
        self._settings = json.dumps([template, dict(variables), cpu_seconds]).encode() + b"\n"
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._start()

    def __call__(self, messages: Sequence[Mapping[str, str]], answer_next: bool) -> str:
        """The text of a conversation.

        Args:
            messages: Each with a role and a content.
            answer_next: Whether the text ends where the next answer begins.

        Raises:
            BDHError: The template fails, or exceeds a limit.
        """
        request = json.dumps([[dict(message) for message in messages], answer_next]).encode() + b"\n"
        with self._lock:
            if self._closed:
                raise BDHError("the model is closed")
            if self._process.poll() is not None:
                self._process = self._start()
            reply = self._exchange(request)
            if not reply:
                reason = self._reason_of_end()
                log.warning("the process that renders the chat template is replaced: it %s", reason)
                self._process = self._start()
                raise BDHError(f"it {reason}")
        result: dict[str, str] = json.loads(reply)
        if "error" in result:
            raise BDHError(result["error"])
        return result["text"]

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._process.kill()  # also while a thread waits for it
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        """A process that gets ready by itself. It does not inherit settings, which may hold API keys."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("BDH_")}
        process = subprocess.Popen(
            # -P: files in the working directory are no modules. A group of its own: Ctrl-C is not for it.
            [sys.executable, "-P", "-m", "bdh.data.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            process_group=0,
        )
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(self._settings)
            process.stdin.flush()
        return process

    def _exchange(self, request: bytes) -> bytes:
        """Sends a request and returns the reply; empty if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except (OSError, ValueError):
            return b""

    def _reason_of_end(self) -> str:
        """Why the process has ended, in words that follow the name of what was rendered."""
        code = self._end()
        if code == -signal.SIGPROF:
            return f"takes more than {self.cpu_seconds:g} seconds"
        if code == -signal.SIGALRM:
            return f"was not rendered within {WALL_SECONDS:g} seconds"
        return f"ended with signal {-code}" if code < 0 else f"ended with code {code}"

    def _end(self) -> int:
        """The exit code of the process, which is killed if it has not ended."""
        with suppress(OSError):
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
        try:
            return self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# ---------------------------------------------------------------------------------------------- in the other process


def main() -> None:
    """Renders what stdin asks for until it is closed. Only the operating system interrupts a template."""
    template, variables, cpu_seconds = json.loads(sys.stdin.buffer.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template(conversations=[[]], chat_template="", **variables)  # imports what it needs
    limit_memory()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # both end the process, as nobody handles their signals
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            messages, answer_next = json.loads(line)
            texts, _ = render_jinja_template(
                conversations=[messages], chat_template=template, add_generation_prompt=answer_next, **variables
            )
            reply = {"text": checked(texts[0], len(line))}
        except Exception as error:  # a template may raise any
            reply = {"error": "it takes too much memory" if isinstance(error, MemoryError) else one_line(error)}
        try:
            written = json.dumps(reply).encode()
        except (MemoryError, RecursionError):
            written = json.dumps({"error": "it takes too much memory"}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(written + b"\n")
        sys.stdout.buffer.flush()


def checked(text: str, request_length: int) -> str:
    """The text, unless it is far longer than the messages. Raises ValueError."""
    longest = TEXT_CHARACTERS + TEXT_GROWTH * request_length
    if len(text) > longest:
        raise ValueError(f"its text has {len(text)} characters; for these messages it may have {longest}")
    return text


def limit_memory() -> None:
    """Limits what the process may take from now on, where the system can."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
