"""Sessions: what was said stays in the synapses, exactly, however an answer ended; on disk too."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bdh.atomic_files import PREFIX
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.file_locks import make_locked_folder, unlock
from bdh.inference.conversation import as_json
from bdh.inference.llm import LLM
from bdh.inference.outputs import Delta
from bdh.inference.runner import ModelRunner
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.session import Session
from bdh.inference.state_file import load_state, save_state
from bdh.model import BDHState
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.conftest import environment
from tests.inference.small import BYTES, CHAT, Tripwire, ctrl_c_works, letters, small_llm, small_model

SYSTEM = "You are a dragon."
HOW = ("length", "stop string", "closed")


def text_of(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def fresh(tokens: list[int], params: SamplingParams, tokenizer: PreTrainedTokenizerFast = BYTES) -> str:
    """What a model that has read nothing else writes after these tokens."""
    llm = LLM(ModelRunner(small_llm(tokenizer).model, 1), tokenizer, prefix_cache_bytes=0)  # type: ignore[arg-type]
    return llm.generate([tokens], params)[0].text


def answer(session: Session, text: str, how: str, params: SamplingParams) -> str:
    """An answer that ends in one of the ways of HOW."""
    if how == "closed":
        deltas = session.send(text, params)
        shown = text_of(next(deltas) for _ in range(7))
        deltas.close()  # type: ignore[attr-defined]
        return shown
    if how == "stop string":
        whole = text_of(Session(session.llm, session.system).send(text, params))
        params = replace(params, stop=(whole[9:12],))
    return text_of(session.send(text, params))


# ----------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tokenizer", [BYTES, CHAT], ids=["transcript", "template"])
def test_answers_are_those_of_a_model_that_reads_it_all(tokenizer: PreTrainedTokenizerFast, how: str) -> None:
    llm = small_llm(tokenizer)
    params = letters(llm.runner.config.vocab_size)
    session = llm.session(SYSTEM, params)
    first = answer(session, "Who are you?", how, params)
    assert first and session.transcript[-1] == {"role": "assistant", "content": first}

    before = llm.chat_format.render(session.transcript[:2])
    lead = " " if tokenizer is BYTES else ""
    raw = fresh(llm.encode(before), params, tokenizer)
    raw = raw[: raw.index(first) + len(first)]  # with the white space before the answer
    after = llm.chat_format.following(session.transcript, {"role": "user", "content": "Indeed?"})
    assert after is not None
    everything = llm.encode(before) + llm.encode(raw) + llm.encode(after)

    second = text_of(session.send("Indeed?", replace(params, seed=8)))
    expected = fresh(everything, replace(params, seed=8), tokenizer)
    assert second == (expected.lstrip() if lead else expected)
    assert [message["role"] for message in session.transcript] == ["system"] + ["user", "assistant"] * 2
    assert session.position == len(everything) + params.max_new_tokens


@pytest.mark.parametrize("tokenizer", [BYTES, CHAT], ids=["transcript", "template"])
def test_only_what_is_new_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    llm = small_llm(tokenizer)
    params = letters(llm.runner.config.vocab_size)
    session = llm.session(SYSTEM, params)
    text_of(session.send("Who are you? " * 20))
    for number in range(3):
        read, known = llm.engine.stats.prefill_tokens, session.position
        text_of(session.send("Hm."))
        new = session.position - known - params.max_new_tokens
        assert llm.engine.stats.prefill_tokens - read == new + 1 < 60, number  # and the last token of the answer


def test_a_turn_ended_by_the_transcripts_own_stop_string_is_not_read_again() -> None:
    """Its beginning is in the synapses already, as the next message will have it."""
    llm = small_llm()
    session = llm.session()
    params = SamplingParams(regex=" yes\nUser: [ab]+", seed=0)
    assert text_of(session.send("Is there a dragon? " * 5, params)) == "yes" and session.ahead is not None
    read = llm.engine.stats.prefill_tokens
    text_of(session.send("Hm.", params))
    assert llm.engine.stats.prefill_tokens - read == len(": Hm.\nAssistant:")


def test_an_end_token_is_the_templates_to_write() -> None:
    """`<|endoftext|>` ends the answer here; the template ends it with `<|im_end|>`, and that is what is read."""
    llm = small_llm(CHAT)
    ending = letters(262, logit_bias={CHAT.eos_token_id: 100.0}, min_new_tokens=3)
    session = llm.session(params=ending)
    said = text_of(session.send("Hi", ending))
    before = llm.encode(llm.chat_format.render(session.transcript[:1]))
    written = llm.generate([before], ending)[0].choices[0].tokens
    assert written[-1] == CHAT.eos_token_id and session.ended and session.unread == []
    everything = (
        before + written[:-1] + llm.encode("<|im_end|>\n<|im_start|>user\nHm<|im_end|>\n<|im_start|>assistant\n")
    )
    assert text_of(session.send("Hm", letters(262))) == fresh(everything, letters(262), CHAT)
    assert session.transcript[1] == {"role": "assistant", "content": said}


def test_a_token_across_the_cut_counts_up_to_it() -> None:
    tokenizer = train_tokenizer("bpe", ["the dragon sees the dragon over there, there are dragons "] * 20, 320)
    llm = LLM(small_model(vocab_size=len(tokenizer)), tokenizer)
    long = tokenizer.convert_tokens_to_ids("Ġdragon")
    session = llm.session()
    params = SamplingParams(max_new_tokens=5, logit_bias={long: 100.0}, stop=("agon drag",), seed=0)
    assert text_of(session.send("Hi", params)) == " dr"
    prompt = llm.chat_format.render(session.transcript[:1])
    assert session.state is None and tokenizer.decode(session.unread) == prompt + " dr"
    assert long not in session.unread[len(llm.encode(prompt)) :]


def test_a_turn_closed_before_its_first_piece_has_not_happened() -> None:
    """By Ctrl-C, too: what was written so far may be the beginning of a stop string, so nothing was handed on."""
    params = letters(logit_bias={ord("x"): 100.0}, stop=("xxxxxxxxx",))
    llm = LLM(Tripwire(small_model(), 1, 3, lambda: signal.raise_signal(signal.SIGINT)), BYTES)
    session = llm.session(SYSTEM)
    with ctrl_c_works(), pytest.raises(KeyboardInterrupt):
        text_of(session.send("Hi", params))
    assert session.transcript == [{"role": "system", "content": SYSTEM}] and session.position == 0
    assert not llm.engine.busy and not session.busy
    assert text_of(session.send("Ho", letters())) == text_of(small_llm().session(SYSTEM).send("Ho", letters()))


def test_an_answer_cut_by_ctrl_c_can_be_written_on() -> None:
    greedy = letters(temperature=0)
    llm = LLM(Tripwire(small_model(), 1, 9, lambda: signal.raise_signal(signal.SIGINT)), BYTES)
    session = llm.session(SYSTEM)
    shown: list[str] = []
    with ctrl_c_works(), pytest.raises(KeyboardInterrupt):
        for delta in session.send("Hi", greedy):
            shown.append(delta.text)
    assert session.transcript[-1]["content"] == "".join(shown) != ""
    shown += [delta.text for delta in session.write(greedy)]
    whole = text_of(small_llm().session(SYSTEM).send("Hi", replace(greedy, max_new_tokens=60)))
    assert whole.startswith("".join(shown)) and session.transcript[-1]["content"] == "".join(shown)
    assert len(session.transcript) == 3


def test_a_template_that_writes_what_was_said_in_another_way_is_read_again() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    llm = LLM(small_model(), tokenizer)
    session = llm.session()
    first = text_of(session.send("Hi", letters()))
    read = llm.engine.stats.prefill_tokens
    second = text_of(session.send("Ho", letters()))
    everything = list(f"3<Hi><{first}><Ho>:".encode())
    assert second == fresh(everything, letters()) and llm.engine.stats.prefill_tokens - read == len(everything)


# -------------------------------------------------------------------------------------------------- reading, writing


def test_reading_and_writing_are_one_text() -> None:
    greedy = letters(temperature=0, max_new_tokens=8)
    llm = small_llm()
    session = llm.session()
    session.read("once upon ")
    session.read("")
    session.read("a")
    read = llm.engine.stats.prefill_tokens
    assert read == len("once upon ") and session.position == read + 1  # the last character waits
    first = text_of(session.write(greedy))
    second = text_of(session.write(greedy))
    assert first + second == fresh(list(b"once upon a"), replace(greedy, max_new_tokens=16))
    session.read(" and")
    third = text_of(session.write(greedy))
    assert third == fresh(list(f"once upon a{first}{second} and".encode()), greedy)
    assert session.transcript == [] and session.position == len("once upon a and") + 24
    assert llm.engine.stats.prefill_tokens - read == 1 + 1 + 4 + 1


@pytest.mark.parametrize("how", ["stop string", "closed", "end token"])
def test_writing_that_was_cut_goes_on_exactly(how: str) -> None:
    llm = small_llm()
    session = llm.session(params=letters())
    session.read("once upon a ")
    whole = fresh(list(b"once upon a "), letters())
    if how == "closed":
        deltas = session.write()
        shown = text_of(next(deltas) for _ in range(5))
        deltas.close()  # type: ignore[attr-defined]
    elif how == "stop string":
        shown = text_of(session.write(letters(stop=(whole[6:9],))))
    else:  # it is part of the text that goes on, as where one document follows another
        shown = text_of(session.write(letters(stop_token_ids=(ord(whole[6]),)))) + whole[6]
    assert whole.startswith(shown) and shown
    assert text_of(session.write()) == fresh(list(f"once upon a {shown}".encode()), letters())
    assert not session.transcript


def test_a_document_before_a_conversation() -> None:
    session = small_llm().session(SYSTEM)
    session.read("Dragons are green. ")
    prompt = f"Dragons are green. {SYSTEM}\n\nUser: Which colour?\nAssistant:"
    expected = fresh(list(prompt.encode()), letters())
    assert text_of(session.send("Which colour?", letters())) == expected.lstrip()


def test_reset_forgets_all_but_the_system_message() -> None:
    session = small_llm().session(SYSTEM)
    first = text_of(session.send("Hi", letters()))
    session.reset()
    assert session.position == 0 and [message["role"] for message in session.transcript] == ["system"]
    assert text_of(session.send("Hi", letters())) == first


def test_what_a_session_cannot_do() -> None:
    llm = small_llm()
    session = llm.session()
    with pytest.raises(BDHError, match="nothing to write on from"):
        text_of(session.write())
    with pytest.raises(BDHError, match="n is 2; a session writes one answer at a time"):
        session.send("Hi", letters(n=2))
    with pytest.raises(BDHError, match="num_beams is 3"):
        session.write(letters(num_beams=3, n=1))
    with pytest.raises(BDHError, match="is no message"):
        session.send(b"Hi")  # type: ignore[arg-type]
    with pytest.raises(BDHError, match="the text is a int"):
        session.read(3)  # type: ignore[arg-type]
    with pytest.raises(BDHError, match="half of one"):
        text_of(session.send("\ud800"))
    deltas = session.send("Hi", letters())
    next(deltas)
    others = (lambda: text_of(session.send("Ho")), lambda: session.read("x"), lambda: session.save("x"), session.reset)
    for other in others:
        with pytest.raises(BDHError, match="the last answer is not finished"):
            other()
    text_of(deltas)
    text_of(session.send("Hi", SamplingParams(regex=" yes\nUser: [ab]+")))
    with pytest.raises(BDHError, match="the last answer is complete"):
        text_of(session.write())


# ------------------------------------------------------------------------------------------------------------ on disk

AFTERWARDS = """
import json, sys
from bdh import LLM, SamplingParams
from tests.inference.small import letters
llm = LLM(sys.argv[1])
said = []
for path in sys.argv[2:]:
    session = llm.load_session(path)
    for params in (session.params, letters(llm.runner.config.vocab_size, temperature=0)):
        said.append("".join(delta.text for delta in session.send("And now?", params)))
    said.append(session.transcript)
    said.append(session.position)
print(json.dumps(said))
"""


def test_a_session_goes_on_in_a_new_process_as_if_nothing_had_been(tmp_path: Path) -> None:
    llm = small_llm()
    assert llm.model is not None
    save_export(llm.model, BYTES, tmp_path / "model", model_card("a test", llm.model.config, []))
    said, paths = [], []
    for how in HOW:
        session = llm.session(SYSTEM, letters(seed=11, stop=("no such thing",)))
        session.read("A document. ")
        answer(session, "Who are you?", how, session.params)
        if how == "length":
            text_of(session.send("Well?", SamplingParams(regex=" yes\nUser: [ab]+")))
        paths.append(tmp_path / f"{how}.session")
        session.save(paths[-1])
        for params in (session.params, letters(temperature=0)):
            said.append(text_of(session.send("And now?", params)))
        said += [session.transcript, session.position]  # type: ignore[list-item]
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS, tmp_path / "model", *paths],
        cwd=Path(__file__).parents[2],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == said


def test_settings_come_back(tmp_path: Path) -> None:
    llm = small_llm()
    params = letters(stop=("a", "b"), stop_token_ids=(3,), logit_bias={4: 1.5}, json_schema={"type": "object"})
    session = llm.session(None, params)
    session.save(tmp_path / "empty")
    loaded = llm.load_session(tmp_path / "empty")
    assert loaded.params == params and loaded.system is None and loaded.position == 0 and loaded.transcript == []
    session = llm.session(None, SamplingParams())
    session.save(str(tmp_path / "empty"))
    assert llm.load_session(tmp_path / "empty").params == SamplingParams()


def test_the_model_is_known_in_another_dtype_and_no_other_is(tmp_path: Path) -> None:
    llm = small_llm()
    session = llm.session()
    session.read("abc")
    session.save(tmp_path / "s")
    half = LLM(small_model(), BYTES, dtype="bfloat16")
    assert half.fingerprint == llm.fingerprint and half.load_session(tmp_path / "s").position == 3
    with pytest.raises(BDHError, match="s is the state of another model"):
        LLM(small_model(seed=1), BYTES).load_session(tmp_path / "s")


def test_files_that_are_no_session_are_refused(tmp_path: Path) -> None:
    llm = small_llm()
    session = llm.session()
    session.read("abc")
    path = tmp_path / "s"
    session.save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]):
        path.write_bytes(damaged)
        with pytest.raises(BDHError, match="s is damaged: "):
            llm.load_session(path)
    path.write_bytes(whole.replace(b"[97, 98", b"[97, 99") if b"[97, 98" in whole else whole.replace(b"[99]", b"[98]"))
    with pytest.raises(BDHError, match="does not match its checksum"):
        llm.load_session(path)
    for name, message in (("none", "does not exist"), (".", "is a folder")):
        with pytest.raises(BDHError, match=message):
            llm.load_session(tmp_path / name)
    state = BDHState.zeros(llm.runner.config, 1)
    save_state(path, state, llm.fingerprint, {"mine": "yes"})
    with pytest.raises(BDHError, match="holds a state, but no session"):
        llm.load_session(path)
    assert load_state(path, llm.runner.config, llm.fingerprint)[1] == {"mine": "yes"}
    save_state(path, BDHState(state.synapses[:1], state.position, 0), llm.fingerprint, {})
    with pytest.raises(BDHError, match="is damaged"):
        llm.load_session(path)


def test_states_that_no_model_left_are_refused(tmp_path: Path) -> None:
    """Though their checksums are right."""
    llm, path = small_llm(), tmp_path / "s"
    zeros = BDHState.zeros(llm.runner.config, 1)
    S, position = zeros.synapses, zeros.position
    for state, message in (
        (BDHState(S, torch.tensor(3), 3), "the positions are not"),
        (BDHState(S, torch.tensor([-1]), 3), "the positions are not"),
        (BDHState(S, torch.tensor([1.5]), 3), "the positions are not"),
        (BDHState(S, position[:0], 3), "the positions are not"),
        (BDHState(S, torch.tensor([1, 1]), 3), "the synapses do not have the model's sizes"),
        (BDHState(S, position, -1), "the length is below 0"),
        (BDHState([one.to(torch.int8) for one in S], position, 0), "the synapses are not finite float32"),
        (BDHState([one / 0 for one in S], position, 0), "the synapses are not finite float32"),
    ):
        save_state(path, state, llm.fingerprint, {})
        with pytest.raises(BDHError, match=f"s is damaged: {message}"):
            load_state(path, llm.runner.config, llm.fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": 5}, "the system message is no text"),
        ({"transcript": "Hello"}, "the transcript is no list of messages"),
        ({"transcript": {}}, "the transcript is no list of messages"),
        ({"transcript": [1, 2]}, r"messages\[0\] is no message"),
        ({"transcript": None}, "the transcript is no list of messages"),
        ({"unread": None}, "unread is no list of the model's tokens"),
        ({"unread": ["a"]}, "unread is no list"),
        ({"unread": [256]}, "unread is no list"),
        ({"unread": [-1]}, "unread is no list"),
        ({"unread": [True]}, "unread is no list"),
        ({"ahead": "abc"}, "ahead is no list"),
        ({"ahead": [97]}, "there are 1 states"),
        ({"answering": 1}, "answering and ended are not true or false"),
        ({"answering": True}, "there is no answer to go on with"),
        ({"params": {**as_json(SamplingParams()), "top_p": 2}}, "top_p is 2; it must be"),
        ({"params": {}}, "holds a state, but no session"),
        ({"params": {**as_json(SamplingParams()), "logit_bias": [1]}}, "holds a state, but no session"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sessions_that_nobody_had_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    llm, path = small_llm(), tmp_path / "s"
    session = llm.session()
    session.read("abc")
    session.save(path)
    state, metadata = load_state(path, llm.runner.config, llm.fingerprint)
    about = {**json.loads(metadata["session"]), **change}
    save_state(path, state, llm.fingerprint, {"session": json.dumps(about)})
    with pytest.raises(BDHError, match=f"s (is damaged: )?{message}") as caught:
        llm.load_session(path)
    assert "\n" not in str(caught.value)


def test_a_session_with_numpys_numbers_is_saved(tmp_path: Path) -> None:
    llm = small_llm()
    params = SamplingParams(seed=np.int64(3), temperature=np.float32(0.5))  # type: ignore[arg-type]
    llm.session(None, params).save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600  # it tells what was said
    assert llm.load_session(tmp_path / "s").params == params


def test_nothing_is_written_but_the_file_itself(tmp_path: Path) -> None:
    """Not through a link where a partial file could be."""
    (tmp_path / "mine").write_text("years")
    (tmp_path / ".partial-s").symlink_to(tmp_path / "mine")
    small_llm().session().save(tmp_path / "s")
    assert (tmp_path / "mine").read_text() == "years" and not (tmp_path / "s").is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"mine", ".partial-s", "s"}


def test_where_a_session_cannot_be_saved_the_old_file_stays(tmp_path: Path) -> None:
    llm = small_llm()
    session = llm.session()
    session.read("abc")
    path = tmp_path / "s"
    session.save(path)
    whole = path.read_bytes()
    session.read("more")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BDHError, match="s cannot be written: "):
            session.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for target, message in ((tmp_path / "none" / "s", "cannot be written: "), (tmp_path, "is a folder; name a file")):
        with pytest.raises(BDHError, match=message) as caught:
            session.save(target)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == whole and [file.name for file in tmp_path.iterdir()] == ["s"]


def test_what_a_killed_process_left_is_removed_by_the_next_that_saves(tmp_path: Path) -> None:
    left, lock = make_locked_folder(tmp_path, PREFIX)
    (left / "s").write_bytes(b"half")
    small_llm().session().save(tmp_path / "s")
    assert {path.name for path in tmp_path.iterdir()} == {"s", left.name}  # its process still writes
    unlock(lock)
    small_llm().session().save(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
