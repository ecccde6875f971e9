"""`bdh chat`: a conversation with a model, on a terminal or through a pipe."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.chat_commands import CHAT_SETTINGS, Chat
from bdh.cli.parsing import Parser
from bdh.cli.settings import add_model, add_settings, given_settings, open_model
from bdh.errors import BDHError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

    from bdh.inference.llm import LLM
    from bdh.inference.session import Session

Read = Callable[[str], str]  # shows a prompt, returns a line; EOFError where none follows


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh chat",
        allow_abbrev=False,
        description="Talk with a model. It keeps what was said in its synapses: the conversation may become as long as "
        "it likes, an answer costs the same. Without a terminal, each line of stdin is a message.",
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", type=str, help="what the model is told before all else")
    parser.add_argument(
        "--session",
        metavar="FILE",
        type=Path,
        help="go on with the conversation in this file, if it is there; at the end it is saved to it",
    )
    add_settings(parser, CHAT_SETTINGS)
    args = parser.parse_args(argv)
    given = given_settings(args)
    if args.session is not None and not os.access(args.session.parent, os.W_OK):
        raise BDHError(f"--session {args.session} cannot be saved: its folder is missing, or not to be written to")

    from bdh.inference.sampling_params import SamplingParams

    SamplingParams(**given)  # mistakes are told before the model is loaded
    llm = open_model(args, 1)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = open_session(llm, args, given)
    llm.check(llm.text_request([0], session.params))  # settings that only the tokenizer can judge
    chat = Chat(llm, session, sys.stdout, sys.stderr, on_terminal)
    try:
        if on_terminal:
            chat.introduce(args.model)
            chat.run(typed(prompt_reader()))
        else:
            chat.run(messages(plain_reader()))
    finally:
        if args.session is not None and (chat.session.position or args.session.exists()):
            chat.session.save(args.session)
    return 0


def open_session(llm: "LLM", args: Any, given: dict[str, Any]) -> "Session":
    """The conversation to go on with, or a new one. Raises BDHError."""
    from bdh.inference.sampling_params import SamplingParams

    if args.session is None or not args.session.exists():
        return llm.session(args.system, SamplingParams(**given))
    session = llm.load_session(args.session)
    if args.system not in (None, session.system):
        raise BDHError(f"--session {args.session} began with another --system; leave it out, or name another file")
    session.params = replace(session.params, **given)
    return session


# ------------------------------------------------------------------------------------------------ where lines come from


def message(read: Read) -> str:
    """A line, and those it goes on in: each but the last ends with a backslash."""
    text = read("> ")
    while text.endswith("\\"):
        try:
            text = f"{text[:-1]}\n{read('… ')}"
        except EOFError:
            return text[:-1]
    return text


def messages(read: Read) -> Iterator[str]:
    """Yields the lines of the user until the input ends."""
    while True:
        try:
            yield message(read)
        except EOFError:
            return


def typed(read: Read) -> Iterator[str]:
    """As `messages`, where Ctrl-C gives up the line, and Ctrl-C once more ends them."""
    pressed = False
    while True:
        try:
            text = message(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            if pressed:
                return
            pressed = True
            print("Ctrl-C once more leaves, as Ctrl-D does")
            continue
        pressed = False
        yield text


def plain_reader() -> Read:
    def read(prompt: str) -> str:
        line = sys.stdin.buffer.readline().decode("utf-8", "replace")
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read


def prompt_reader() -> Read:
    """Lines from a terminal, to edit as in a shell, with those of earlier conversations to go back to."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=history(), key_bindings=keys, prompt_continuation="… ")
    return session.prompt


def history() -> "History":
    """The history of typed lines, in a file that only this user can read; in memory if there can be no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "bdh"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "chat_history"
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # no home, or none to write to
        return InMemoryHistory()
    return FileHistory(str(path))
