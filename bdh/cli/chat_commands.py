"""Handles the lines of a chat: commands, and messages that the model answers."""

import json
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from bdh.cli.settings import SETTINGS, from_text
from bdh.cli.terminal import show
from bdh.errors import BDHError, suggestion

if TYPE_CHECKING:
    from bdh.inference.llm import LLM
    from bdh.inference.session import Session

CHAT_SETTINGS = [name for name in SETTINGS if name not in ("n", "best_of", "num_beams", "logprobs")]

LINES_HELP = """
Alt-Enter goes on in a new line, and so does Enter after a backslash. A line that begins with a space is no command.
Ctrl-C stops an answer, and what is there of it stays part of the conversation. Ctrl-D leaves."""


class Chat:
    """A conversation, and the commands about it.

    Args:
        llm: The model.
        session: The conversation to go on with; its params are what /set changes.
        out: Gets answers, and what commands show.
        err: Gets a line for each mistake.
        watched: Whether someone sits at a terminal: Ctrl-C then ends an answer and not the program, and notes say why
            an answer ended.
    """

    def __init__(self, llm: "LLM", session: "Session", out: TextIO, err: TextIO, watched: bool):
        self.llm = llm
        self.session = session
        self.out = out
        self.err = err
        self.watched = watched
        self.files: set[Path] = set()  # what was loaded or saved: /save may write these again
        self.written = 0  # tokens
        self.speed: float | None = None  # of the last answer, in tokens a second
        self.over = False
        self.notices: list[str] = []  # about the model, to be shown after an answer
        llm.notify = self.notices.append

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until they end, or /quit."""
        for line in lines:
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line.strip():
                    self.answer(line)
            except BDHError as error:
                self.tell(" ".join(str(error).split()), self.err)
            except KeyboardInterrupt:
                if not self.watched:
                    raise
                self.tell("stopped", self.err)
            for notice in self.notices:
                self.tell(f"notice: {notice}", self.err)
            self.notices.clear()
            if self.over:
                return

    def tell(self, line: str, stream: TextIO | None = None) -> None:
        show(f"{line}\n", stream or self.out)

    def introduce(self, name: str) -> None:
        """Prints the introduction of a chat on a terminal."""
        self.tell(f"{name} on {self.llm.runner.device}: {self.changed_settings()}")
        if self.llm.tokenizer.chat_template is None:
            self.tell("its tokenizer has no chat template; it reads the conversation as a plain transcript")
        self.tell("/help shows the commands, Ctrl-D leaves")

    def answer(self, text: str) -> None:
        """Has a message answered, and shows the answer as it comes. Raises BDHError."""
        deltas: Any = self.session.send(text)
        times: list[float] = []
        tokens, reason = [], None
        with CtrlC() as ctrl_c, closing(deltas):
            try:
                for delta in deltas:
                    ctrl_c.is_noted = True
                    show(delta.text, self.out)
                    times.append(time.monotonic())
                    tokens.append(len(delta.tokens))
                    reason = delta.finish_reason
                    if ctrl_c.pressed:
                        break
            except KeyboardInterrupt as error:
                if self.watched:
                    raise BDHError("stopped before there was an answer; the message is forgotten") from error
                raise
        self.tell("")
        self.written += sum(tokens)
        self.speed = sum(tokens[1:]) / (times[-1] - times[0]) if len(times) > 1 else None
        if ctrl_c.pressed and not self.watched:
            raise KeyboardInterrupt
        if self.watched and reason != "stop":
            most = self.session.params.max_new_tokens
            self.tell("(stopped)" if reason is None else f"(max_new_tokens is {most}, and that many are written)")

    # ------------------------------------------------------------------------------------------------------ commands

    def command(self, line: str) -> None:
        """Does what a line that begins with a slash says. Raises BDHError."""
        name, _, rest = line.partition(" ")
        name, rest = name.strip(), rest.strip()
        if name not in COMMANDS:
            raise BDHError(f"{name} is not a command; {suggestion(name, COMMANDS)}")
        takes, _, act = COMMANDS[name]
        if rest and not takes:
            raise BDHError(f"{name} takes nothing")
        if not rest and takes and not takes.startswith("["):
            raise BDHError(f"{name} needs a {takes}")
        act(self, rest)

    def help(self, _: str) -> None:
        rows = {f"{name} {takes}": words for name, (takes, words, _) in COMMANDS.items()}
        width = max(map(len, rows))
        self.tell("\n".join(f"{row:<{width}}  {words}" for row, words in rows.items()) + LINES_HELP)

    def set(self, rest: str) -> None:
        from bdh.inference.sampling_params import SamplingParams

        name, _, text = rest.partition(" ")
        if name and name not in CHAT_SETTINGS:
            raise BDHError(f"{name} is not a setting; {suggestion(name, CHAT_SETTINGS)}")
        if text:
            value = getattr(SamplingParams(), name) if text == "none" else from_text(name, text.strip())
            params = replace(self.session.params, **{name: value})
            self.llm.check(self.llm.text_request([0], params))
            self.session.params = params
        for shown in [name] if name else CHAT_SETTINGS:
            self.tell(f"{shown:<{0 if name else 20}} {as_text(getattr(self.session.params, shown))}")

    def changed_settings(self) -> str:
        """The settings that are not as usual, and two that one always wants to know."""
        from bdh.inference.sampling_params import SamplingParams

        always, usual = ("max_new_tokens", "temperature"), SamplingParams()
        values = {name: getattr(self.session.params, name) for name in CHAT_SETTINGS}
        return ", ".join(f"{k} {as_text(v)}" for k, v in values.items() if k in always or v != getattr(usual, k))

    def system(self, text: str) -> None:
        if text:
            self.session = self.llm.session(text, self.session.params)
            self.tell("a new conversation begins")
        else:
            self.tell(self.session.system or "there is no system message")

    def reset(self, _: str) -> None:
        self.session.reset()
        self.tell("a new conversation begins")

    def save(self, rest: str) -> None:
        path = Path(rest).expanduser().absolute()
        if path.exists() and path not in self.files:
            raise BDHError(f"{rest} is there already; remove it, or name another file")
        self.session.save(path)
        self.files.add(path)
        self.tell(f"{rest} is the conversation up to here")

    def load(self, rest: str) -> None:
        path = Path(rest).expanduser().absolute()
        self.session = self.llm.load_session(path)
        self.files.add(path)
        self.tell(f"{rest} is loaded: {self.session.position} tokens; {self.changed_settings()}")

    def stats(self, _: str) -> None:
        speed = "nothing to measure" if self.speed is None else f"{self.speed:,.1f} tokens a second"
        for name, value in {
            "tokens read": f"{self.llm.engine.stats.prefill_tokens:,}",
            "tokens written": f"{self.written:,}",
            "last answer": speed,
            "position": f"{self.session.position:,}",
            "synapses": f"{self.llm.runner.state_nbytes:,} bytes",
        }.items():
            self.tell(f"{name:<14}  {value}")

    def quit(self, _: str) -> None:
        self.over = True


COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], None]]] = {  # what it takes, what it does
    "/help": ("", "show this", Chat.help),
    "/set": ("[NAME VALUE]", "change a setting; none puts it back; without a name: show all", Chat.set),
    "/system": ("[TEXT]", "begin anew and tell the model this before all else; without a text: show it", Chat.system),
    "/reset": ("", "forget the conversation", Chat.reset),
    "/save": ("FILE", "save the conversation, settings and synapses included", Chat.save),
    "/load": ("FILE", "go on with a conversation that was saved", Chat.load),
    "/stats": ("", "show what was read and written, and how fast", Chat.stats),
    "/quit": ("", "leave", Chat.quit),
}


def as_text(value: Any) -> str:
    """The value of a setting, as /set takes it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class CtrlC:
    """Ctrl-C while an answer comes: once, and never amid the session's own work.

    Before the first piece it raises KeyboardInterrupt, which the engine lets wait for the end of its step; from then on
    it is noted, for whoever takes the pieces.
    """

    def __init__(self) -> None:
        self.is_noted = False
        self.pressed = False

    def __enter__(self) -> "CtrlC":
        self.before = signal.signal(signal.SIGINT, self.take)
        return self

    def take(self, number: int, frame: FrameType | None) -> None:
        again, self.pressed = self.pressed, True
        if not self.is_noted and not again:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)
