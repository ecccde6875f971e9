"""`bdh chat`: through a pipe, at a terminal, and what its commands do."""

import io
import os
import re
import signal
import stat
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging

from bdh.cli import chat as chat_module
from bdh.cli.chat import messages, typed
from bdh.cli.chat_commands import CHAT_SETTINGS, COMMANDS, Chat
from bdh.cli.main import main
from bdh.cli.settings import SETTINGS
from bdh.cli.terminal import show, visible
from bdh.data.vocabulary import train_tokenizer
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHConfig, BDHForCausalLM
from tests.cli.terminal import Terminal
from tests.conftest import Run

READY = r"\x1b\[\?2004h"  # the line editor takes keys
QUICK = SamplingParams(max_new_tokens=12, seed=5)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """As in a process of its own, where `bdh` says so before the library is loaded."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def llm(finished_run: Path) -> LLM:
    return LLM(finished_run / "model", max_batch_size=1)


@pytest.fixture(scope="module")
def templated() -> LLM:
    """A model whose tokenizer has a chat template."""
    torch.manual_seed(0)
    config = BDHConfig(vocab_size=262, n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
    return LLM(BDHForCausalLM(config), train_tokenizer("bytes", (), 262), max_batch_size=1)


def talk(llm: LLM, *lines: str, params: SamplingParams = QUICK, watched: bool = False) -> tuple[Chat, str, str]:
    """A chat of these lines; what it showed, and its complaints."""
    chat = Chat(llm, llm.session(None, params), io.StringIO(), io.StringIO(), watched)
    chat.run(iter(lines))
    assert isinstance(chat.out, io.StringIO) and isinstance(chat.err, io.StringIO)
    return chat, chat.out.getvalue(), chat.err.getvalue()


# ---------------------------------------------------------------------------------------------------- through a pipe


def test_a_pipe_gets_answers_and_nothing_else(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    lines = "hello\n\n/nonsense\nsome \\\nmore\n/quit\nnot read\n"
    done = bdh("chat", "--model", finished_run / "model", "--seed", 5, "--max_new_tokens", 12, input=lines)
    assert done.returncode == 0
    assert done.stderr == "/nonsense is not a command; there are " + ", ".join(COMMANDS) + "\n"
    llm = LLM(finished_run / "model")
    session = llm.session(None, QUICK)
    answers = ["".join(delta.text for delta in session.send(text)) for text in ("hello", "some \nmore")]
    assert done.stdout == "".join(answer.replace("\r", "\n") + "\n" for answer in answers)  # text mode reads \r as \n
    assert not list(tmp_path.iterdir())


def test_wrong_flags_are_one_line(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("mine")
    model = str(finished_run / "model")
    cases = {
        ("--temperature", "-1"): "temperature is -1.0; it must be at least 0",
        ("--top_kk", "3"): "--top_kk is not an option; did you mean --top_k?",
        ("--n", "3"): "--n is not an option",
        ("--session", str(tmp_path / "nowhere" / "file")): "its folder is missing, or not to be written to",
        ("--session", str(tmp_path / "note.txt")): "note.txt",
        ("--stop_token_ids", "999"): "stop_token_ids has the token 999; the model's tokens are 0 to 255",
        ("--regex", "("): "regex",
        ("--json_schema", "@nowhere.json"): "nowhere.json cannot be read: No such file or directory",
        ("--json_schema", "{"): "json_schema is '{'; it must be JSON",
    }
    for flags, words in cases.items():
        assert main(["chat", "--model", model, *flags]) == 2, flags
        captured = capsys.readouterr()
        assert captured.err.startswith("bdh chat: error: ") and words in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert main(["chat", "--model", str(tmp_path / "nowhere")]) == 2
    assert (tmp_path / "note.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ at a terminal


def test_a_terminal_streams_and_ctrl_c_ends_the_answer_only(finished_run: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", "--model", finished_run / "model", "--max_new_tokens", 10**6, "--seed", 1, cwd=tmp_path)
    greeting = terminal.expect(READY)
    assert "max_new_tokens 1000000, temperature 0.8, seed 1" in greeting and "/help" in greeting
    terminal.type("hello\r")
    answer = terminal.expect(r"hello.*\x1b\[\?2004l.{200}")  # the editor is done, and an answer comes
    terminal.type("\x03")
    answer += terminal.expect(r"\r\n\(stopped\)\r\n")
    written = re.split(r"\x1b\[\?2004l", answer)[1].replace("^C", "")
    controls = {c for c in written if unicodedata.category(c) == "Cc"} - {"\r", "\n", "\t"}
    assert not controls and any("\u2400" <= c <= "\u2421" for c in written)

    terminal.expect(READY)
    terminal.type("/stats\r")
    position = re.findall(r"position +([\d,]+)", terminal.expect(READY))
    assert int(position[0].replace(",", "")) > 200  # what was written stays
    terminal.type("/set max_new_tokens 5\r")
    terminal.expect("max_new_tokens 5\r\n.*" + READY)
    terminal.type("two\x1b\rlines\r")  # Alt-Enter
    terminal.expect(r"max_new_tokens is 5, and that many are written.*" + READY)
    terminal.type("half a line\x03")
    terminal.expect("Ctrl-C once more leaves.*" + READY)
    terminal.type("more\\\r")
    terminal.expect(READY)
    terminal.type("of it\r")
    terminal.expect("that many are written.*" + READY)
    terminal.type("/quit\r")
    assert terminal.end()[0] == 0

    history = tmp_path / ".local" / "state" / "bdh" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+two\n+lines\n" in history.read_text()


def test_a_session_is_kept_in_a_file(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["chat", "--model", str(finished_run / "model"), "--session", "talk", "--max_new_tokens", "8"]
    terminal = Terminal(*argv, "--temperature", 0, "--system", "Be kind.", cwd=tmp_path, XDG_STATE_HOME=f"{tmp_path}/s")
    terminal.expect(READY)
    terminal.type("hello\r")
    terminal.expect("that many are written.*" + READY)
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end()[0] == 0
    assert (tmp_path / "s" / "bdh" / "chat_history").exists()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/system\ngo on\n")))
    assert main(argv) == 0  # through a pipe, with the temperature and the system message of the file
    assert capsys.readouterr().out.startswith("Be kind.\n")
    llm = LLM(finished_run / "model")
    session = llm.session("Be kind.", SamplingParams(max_new_tokens=8, temperature=0))
    for text in ("hello", "go on"):
        list(session.send(text))
    loaded = llm.load_session(tmp_path / "talk")
    assert loaded.transcript == session.transcript and loaded.position == session.position
    assert main([*argv, "--system", "Be rude."]) == 2
    assert "--session talk began with another --system; leave it out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- commands


def test_help_tells_every_command(llm: LLM) -> None:
    chat, out, err = talk(llm, "/help")
    assert err == "" and not chat.over and "Alt-Enter" in out and "backslash" in out
    assert all(f"\n{name} " in f"\n{out}" for name in COMMANDS)


def test_every_mistake_is_one_line_and_the_chat_goes_on(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    cases = {
        "/hlep": "/hlep is not a command; did you mean /help?",
        "/": "/ is not a command; there are /help, /set",
        "/reset now": "/reset takes nothing",
        "/save": "/save needs a FILE",
        "/load  ": "/load needs a FILE",
        f"/load {tmp_path}/nowhere": "nowhere does not exist",
        f"/load {tmp_path}/note.txt": "note.txt",
        f"/load {tmp_path}": str(tmp_path),
        f"/save {tmp_path}/note.txt": "note.txt is there already; remove it, or name another file",
        f"/save {tmp_path}/no/where": "no/where",
        "/save /proc/nothing": "/proc/nothing",
        "/set top_q 1": "top_q is not a setting; did you mean top_p?",
        "/set n 2": "n is not a setting; ",
        "/set top_p 2": "top_p is 2; it must be above 0 and at most 1",
        "/set top_k many": "top_k is 'many'; it must be a whole number",
        "/set ignore_eos perhaps": "ignore_eos is 'perhaps'; it must be true or false",
        "/set max_new_tokens": "",
        "/set stop_token_ids [999]": "the model's tokens are 0 to 255",
        '/set logit_bias {"x": 1}': "logit_bias has the token 'x'; it must be a whole number",
        f"/set logit_bias {'[' * 100_000}": "logit_bias is '[[[[",
        "/set stop_token_ids 3": "stop_token_ids is 3; it must be a list of token ids",
        "/set regex (": "regex",
        "/set json_schema {": "json_schema is '{'; it must be JSON",
        f"/set json_schema @{tmp_path}/nowhere.json": "nowhere.json cannot be read",
        "half of \ud800": "is not valid text",
    }
    for line, words in cases.items():
        chat, out, err = talk(llm, line, "hello")
        assert words in err and err.count("\n") == bool(words), (line, err)
        assert len(out) > 5 and chat.session.params == QUICK, line
    assert (tmp_path / "note.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_set_changes_what_is_written(llm: LLM) -> None:
    chat, out, err = talk(llm, "/set temperature 0", "/set max_new_tokens 3", '/set stop ["\\n", "zz"]', "hello")
    assert err == "" and chat.session.params == SamplingParams(
        max_new_tokens=3, seed=5, temperature=0, stop=("\n", "zz")
    )
    assert out.startswith('temperature 0.0\nmax_new_tokens 3\nstop ["\\n", "zz"]\n') and chat.written <= 3
    chat, out, _ = talk(llm, "/set seed none", "/set stop ###", "/set")
    assert chat.session.params == SamplingParams(max_new_tokens=12, stop=("###",))
    shown = dict(line.split(maxsplit=1) for line in out.splitlines()[2:])
    assert list(shown) == CHAT_SETTINGS and shown["stop"] == '["###"]' and shown["seed"] == "none"
    chat, out, err = talk(llm, '/set logit_bias {"101": -5}')
    assert err == "" and out == 'logit_bias {"101": -5.0}\n' and chat.session.params.logit_bias == {101: -5}
    chat, out, _ = talk(llm, "/set regex [0-9]{4}", "hello")
    assert re.fullmatch(r"regex \[0-9\]\{4\}\n\d{4}\n", out)


def test_a_conversation_is_saved_loaded_and_begun_anew(llm: LLM, templated: LLM, tmp_path: Path) -> None:
    for model in (llm, templated):
        file = tmp_path / f"{model.runner.config.vocab_size}.talk"
        plain, straight, _ = talk(model, "one", "two", "three")
        chat, out, err = talk(model, "one", "two", f"/save {file}", "three", f"/load {file}", "three", f"/save {file}")
        assert err == ""
        answer = chat.session.transcript[-1]["content"]
        assert chat.session.transcript == plain.session.transcript
        assert out.count(answer) >= 2 and straight.endswith(f"{answer}\n")
        assert main_error(model, f"/load {tmp_path / '256.talk'}") == ("" if model is llm else "model")
    fresh, _, _ = talk(llm, "one")
    chat, out, _ = talk(llm, "zero", "/reset", "one")
    assert chat.session.transcript == fresh.session.transcript and "a new conversation begins" in out
    chat, out, _ = talk(llm, "zero", "/system Be kind.", "/system", "one", "/reset")
    assert "\nBe kind.\n" in out and chat.session.transcript == [{"role": "system", "content": "Be kind."}]


def main_error(llm: LLM, line: str) -> str:
    """A word for what is wrong with a line: nothing, or that the file is another model's."""
    _, _, err = talk(llm, line)
    return "model" if "model" in err else err


def test_stats_count(llm: LLM) -> None:
    session = llm.session(None, QUICK)
    before = llm.engine.stats.prefill_tokens
    list(session.send("hello"))
    read = llm.engine.stats.prefill_tokens - before
    _, out, _ = talk(llm, "hello", "/stats")
    rows = dict(re.split(r"  +", line) for line in out.splitlines()[-5:])
    assert rows["tokens written"] == "12" and rows["position"] == f"{session.position:,}"
    assert rows["tokens read"] == f"{before + 2 * read:,}"
    assert rows["synapses"] == f"{4 * 2 * 128 * 16:,} bytes" and re.fullmatch(
        r"[\d,.]+ tokens a second", rows["last answer"]
    )


def test_a_line_that_begins_with_a_space_is_said(llm: LLM) -> None:
    chat, _, err = talk(llm, " /reset", "   ")
    assert err == "" and [m["content"] for m in chat.session.transcript if m["role"] == "user"] == [" /reset"]


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


class PressesCtrlC(io.StringIO):
    """A screen at which someone presses Ctrl-C when so much is shown, twice."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.after and self.tell() > self.after:
            self.after = 0
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return written


def test_ctrl_c_keeps_what_was_shown(llm: LLM) -> None:
    long = SamplingParams(max_new_tokens=10**6, seed=2)
    chat = Chat(llm, llm.session(None, long), PressesCtrlC(40), io.StringIO(), True)
    before = signal.getsignal(signal.SIGINT)
    chat.run(iter(["hello"]))
    assert signal.getsignal(signal.SIGINT) is before
    assert isinstance(chat.out, io.StringIO)
    answer = chat.out.getvalue().removesuffix("\n(stopped)\n")
    assert 40 < len(answer) < 60 and chat.session.transcript[-1] == {"role": "assistant", "content": answer}
    chat.run(iter(["/set max_new_tokens 5", "again"]))
    assert len(chat.session.transcript) == 4 and not llm.engine.busy

    chat = Chat(llm, llm.session(None, long), PressesCtrlC(40), io.StringIO(), False)  # a pipe: the program ends
    with pytest.raises(KeyboardInterrupt):
        chat.run(iter(["hello", "not said"]))
    assert len(chat.session.transcript) == 2 and not llm.engine.busy


def test_ctrl_c_while_a_message_is_read(llm: LLM) -> None:
    chat = Chat(llm, llm.session(None, QUICK), io.StringIO(), io.StringIO(), True)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    def lines() -> Iterator[str]:
        text = "long " * 400_000
        timer.start()
        yield text
        timer.join()

    chat.run(lines())
    assert isinstance(chat.err, io.StringIO) and "the message is forgotten" in chat.err.getvalue()
    assert chat.session.transcript == [] and chat.session.position == 0 and not llm.engine.busy
    chat.run(iter(["hello"]))
    assert chat.session.transcript == talk(llm, "hello")[0].session.transcript


# -------------------------------------------------------------------------------------------------------------- lines


def lines_of(*given: str | type[BaseException]) -> Callable[[str], str]:
    """Reads these lines in turn; an exception stands for what a key does."""
    rest = iter(given)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_a_backslash_joins_lines() -> None:
    read: Any = lines_of("one", "two\\", "three\\", "four", "", "five\\")
    assert list(messages(read)) == ["one", "two\nthree\nfour", "", "five"]


def test_ctrl_c_gives_up_a_line_and_twice_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    stop = KeyboardInterrupt
    assert list(typed(lines_of("one", stop, "two", "three\\", stop, "four", stop, stop, "five"))) == [
        "one",
        "two",
        "four",
    ]
    assert capsys.readouterr().out.count("once more") == 3
    assert list(typed(lines_of("one"))) == ["one"]


def test_a_history_that_cannot_be_kept_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert type(chat_module.history()).__name__ == "InMemoryHistory"


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = visible(text)
    assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    assert visible(shown) == shown
    if not any(unicodedata.category(c) == "Cc" for c in text):
        assert shown == text


def test_pictures_of_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("\x1b[2J\x00\r\n\t\x7f\x9b2J\x85") == "␛[2J␀␍\n\t␡␛[2J␛E"
    show("\x1b[2J", sys.stdout)
    assert capsys.readouterr().out == "\x1b[2J"  # no terminal


def test_settings_of_a_chat() -> None:
    assert set(SETTINGS) - set(CHAT_SETTINGS) == {"n", "best_of", "num_beams", "logprobs"}
