"""Sessions: conversations whose synapses stay, so that only what is new is read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdh.errors import BDHError
from bdh.inference.answer import Answer, Delta, TextRequest
from bdh.inference.chat_format import check_messages
from bdh.inference.params import SamplingParams
from bdh.inference.request import Request
from bdh.inference.state_file import load_state, save_state
from bdh.model import BDHState

if TYPE_CHECKING:
    from bdh.inference.llm import LLM

ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0)  # as few as a request can write


class Session:
    """A conversation, or any text that goes on, with a state of its own. One thing at a time.

    What a session has said and heard is one sequence of tokens: those that `state` has read, then those in `unread`. Of
    an answer that was cut, by a stop string or because its iterator was closed, the tokens up to the cut count (of one
    that reaches across it, the text up to there), and a turn that was closed before its first piece has not happened.

    Attributes:
        system: What the assistant is told before all else.
        params: For answers whose `send` or `write` has none.
        transcript: The messages of the conversation, without what `read` and `write` added in between.
    """

    def __init__(self, llm: "LLM", system: str | None = None, params: SamplingParams | None = None):
        self.llm = llm
        self.system = system
        self.params = params or SamplingParams()
        self.busy = False  # an answer is being written
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message. Raises BDHError while an answer is not finished."""
        self._check_idle()
        self.transcript: list[dict[str, str]] = []
        if self.system is not None:
            self.transcript.append({"role": "system", "content": self.system})
        self.state: BDHState | None = None  # None: before the first token
        self.unread: list[int] = []  # what follows
        # A state further on, and the tokens it has read after `state`. Some of them, of a stop string, do not count;
        # but if what comes next turns out to begin with them all, nothing need be read again.
        self.ahead: tuple[BDHState, list[int]] | None = None
        self.answering = False  # the last message is an answer that `write` can go on with
        self.ended = False  # the last answer is complete

    @property
    def position(self) -> int:
        """Tokens said and heard so far."""
        return (0 if self.state is None else int(self.state.position[0])) + len(self.unread)

    # ------------------------------------------------------------------------------------------------------- talking

    def send(self, text: str, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Says something to the assistant; yields its answer as it is written.

        Only the new message is read. Where the chat template does not simply go on, because it writes what was said
        before in another way now, the whole transcript is read again, and what `read` and `write` added is forgotten.

        Raises:
            BDHError: The text or the params are wrong, the template does not take the message, or another answer is not
                finished.
        """
        message = {"role": "user", "content": text}
        check_messages([message])
        return self._send(message, self._checked(params))

    def read(self, text: str) -> None:
        """Reads a text that needs no answer, say a document, into the synapses. Raises BDHError."""
        self._check_idle()
        tokens = self.llm.encode(text, "the text")
        if not tokens:
            return
        state, prompt = self._with(tokens)
        if len(prompt) > 1:  # the last one waits for what follows: to go on, there must be a token to read
            state, prompt = self._after(state, prompt[:-1]), prompt[-1:]
        self._go_to(state, prompt)
        self.answering = self.ended = False

    def write(self, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Writes on from where the session is; yields the text as it comes.

        After an answer that was cut short this goes on with the answer, and the transcript has it; else it is text that
        the transcript knows nothing of.

        Raises:
            BDHError: There is nothing to go on from, or the last answer is complete; or as for `send`.
        """
        return self._write(self._checked(params))

    def _send(self, message: dict[str, str], params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        chat, said = self.llm.chat_format, self.transcript
        answered = bool(said) and said[-1]["role"] == "assistant"
        text = chat.following(said, message) if answered else None
        tokens = self.llm.encode(chat.render([*said, message]) if text is None else text, "the conversation")
        again = answered and text is None
        state, prompt = (None, tokens) if again else self._with(tokens)
        yield from self._turn(self.llm.as_answer(self._asked(state, prompt, params)), message)

    def _write(self, params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        if self.ended:
            raise BDHError("the last answer is complete; send a message, or let the session read something, to go on")
        if not self.unread:
            raise BDHError("there is nothing to write on from; send a message, or let the session read something")
        asked = self._asked(*self._with([]), params)
        if self.answering:
            asked = replace(self.llm.as_answer(asked), strip=False)
        yield from self._turn(asked, None)

    def _asked(self, state: BDHState | None, prompt: list[int], params: SamplingParams) -> TextRequest:
        request = Request(prompt, params, end_token_ids=self.llm.end_token_ids, state=state, keep_state=True)
        return TextRequest(request, stop=params.stop)

    def _turn(self, asked: TextRequest, message: dict[str, str] | None) -> Iterator[Delta]:
        """Has an answer written. The session goes on from it when it is over, however that comes about."""
        answer = self.llm.start(asked, wants_deltas=True)
        self.busy = True
        given: list[str] = []
        try:
            for delta in self.llm.pieces(answer):
                given.append(delta.text)
                yield delta
        finally:
            self.busy = False
            self.llm.finish(answer)
            whole = not answer.unfinished and not answer.deltas
            text = "".join(given)
            if whole or text:
                self._settle(answer, text, whole, message)

    def _settle(self, answer: Answer, text: str, whole: bool, message: dict[str, str] | None) -> None:
        """Takes what counts of an answer into the session: all of it, or the text that was handed on."""
        if message is not None:
            self.transcript += [message, {"role": "assistant", "content": ""}]
            self.answering = True
        if self.answering:
            self.transcript[-1]["content"] += text
        continuation, prompt = answer.continuations[0], list(answer.request.prompt)
        tokens = continuation.tokens
        if not whole or continuation.text.stopped:
            counting, rest = continuation.text.kept(len(text))
            counting = counting + self.llm.encode(rest)
        elif self.answering and tokens[-1] in answer.request.ends:
            counting = tokens[:-1]  # the template says how an answer ends
        else:
            counting = tokens
        self.ended = self.answering and whole and continuation.finish_reason == "stop"
        said, read = prompt + counting, prompt + tokens[:-1]
        if continuation.state is None:
            self._go_to(answer.request.state, said)
        elif said[: len(read)] == read and (len(said) > len(read) or self.ended):
            self._go_to(continuation.state, said[len(read) :])
        else:
            self._go_to(answer.request.state, said, ahead=(continuation.state, read))

    # ----------------------------------------------------------------------------------------- where the session is

    def _with(self, tokens: list[int]) -> tuple[BDHState | None, list[int]]:
        """What goes on with these tokens: the state furthest on, and what follows it."""
        unread = self.unread + tokens
        if self.ahead is not None:
            state, read = self.ahead
            if len(unread) > len(read) and unread[: len(read)] == read:
                return state, unread[len(read) :]
        return self.state, unread

    def _go_to(
        self, state: BDHState | None, unread: list[int], ahead: tuple[BDHState, list[int]] | None = None
    ) -> None:
        self.state, self.unread, self.ahead = state, unread, ahead

    def _after(self, state: BDHState | None, tokens: list[int]) -> BDHState | None:
        """The state after some more tokens."""
        answer = self.llm.start(
            TextRequest(Request(tokens, ONE_TOKEN, state=state, keep_state=True)), wants_deltas=True
        )
        try:
            for _ in self.llm.pieces(answer):
                pass
        finally:
            self.llm.drop(answer)
        return answer.continuations[0].state

    def _check_idle(self) -> None:
        if self.busy:
            raise BDHError("the last answer is not finished; take all of it, or close its iterator, before going on")

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        params = params or self.params
        for name in ("n", "best_of", "num_beams"):
            if (value := getattr(params, name)) not in (None, 1):
                raise BDHError(f"{name} is {value}; a session writes one answer at a time, so it must be 1")
        return params

    # ------------------------------------------------------------------------------------------------------ on disk

    def save(self, path: str | Path) -> None:
        """Writes the session to a file, whole or not at all, for `LLM.load_session`.

        Raises:
            BDHError: An answer is not finished, or the file cannot be written; an older one is then as it was.
        """
        self._check_idle()
        first = self.state or BDHState.zeros(self.llm.runner.config, 1)
        states = [first] if self.ahead is None else [first, self.ahead[0]]
        about = {
            "system": self.system,
            "params": as_json(self.params),
            "transcript": self.transcript,
            "unread": self.unread,
            "ahead": None if self.ahead is None else self.ahead[1],
            "answering": self.answering,
            "ended": self.ended,
        }
        save_state(path, joined(states), self.llm.fingerprint, {"session": json.dumps(about)})

    @classmethod
    def load(cls, llm: "LLM", path: str | Path) -> "Session":
        """Reads a session that `save` wrote. Raises BDHError if it is not one, or is of another model."""
        states, metadata = load_state(path, llm.runner.config, llm.fingerprint)
        try:
            about = json.loads(metadata["session"])
            session = cls(llm, about["system"], from_json(about["params"]))
            session.transcript = about["transcript"]
            check_about(about, states.batch_size, llm.runner.config.vocab_size)
            first = row(states, 0) if int(states.position[0]) else None
            ahead = None if about["ahead"] is None else (row(states, 1), about["ahead"])
            session._go_to(first, about["unread"], ahead)
            session.answering, session.ended = about["answering"], about["ended"]
        except BDHError as error:
            raise BDHError(f"{path} is damaged: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise BDHError(f"{path} holds a state, but no session; give a file that a session was saved to") from error
        return session


def check_about(about: Mapping[str, Any], n_states: int, vocab_size: int) -> None:
    """Raises BDHError unless a session could have written this, beside as many states, about itself."""
    transcript, ahead = about["transcript"], about["ahead"]
    if not isinstance(about["system"], str | None):
        raise BDHError("the system message is no text")
    if not isinstance(transcript, list):
        raise BDHError("the transcript is no list of messages")
    if transcript:
        check_messages(transcript)
    for name, tokens in (("unread", about["unread"]), ("ahead", [] if ahead is None else ahead)):
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
            raise BDHError(f"{name} is no list of the model's tokens")
    if n_states != (1 if ahead is None else 2):
        raise BDHError(f"there are {n_states} states; one is of the session, and one of what is ahead")
    if not all(isinstance(about[name], bool) for name in ("answering", "ended")):
        raise BDHError("answering and ended are not true or false")
    if about["answering"] and (not transcript or transcript[-1]["role"] != "assistant"):
        raise BDHError("there is no answer to go on with")


def joined(states: list[BDHState]) -> BDHState:
    """States of one sequence each as one of them all, on the CPU."""
    states = [state.to("cpu") for state in states]
    layers = [
        torch.cat(layer) for layer in zip(*(state.synapses for state in states), strict=True)
    ]  # (B, h, N, D) each
    return BDHState(layers, torch.cat([state.position for state in states]), states[0].length)


def row(states: BDHState, index: int) -> BDHState:
    """One sequence's state, a batch of one."""
    state = states.select(torch.tensor([index]))
    return BDHState(state.synapses, state.position, int(state.position[0]))


def as_json(params: SamplingParams) -> dict[str, Any]:
    """Sampling params as JSON has them."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def from_json(values: dict[str, Any]) -> SamplingParams:
    """Sampling params that `as_json` made JSON of, where all keys are text."""
    bias = values["logit_bias"]
    return SamplingParams(**{**values, "logit_bias": bias and {int(token): value for token, value in bias.items()}})
