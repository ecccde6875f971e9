"""What a session is, whoever drives the engine: what it has read, what is planned next, and what comes of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.data.chat_format import check_messages
from bdh.errors import BDHError
from bdh.inference.outputs import RequestOutput, TextRequest
from bdh.inference.params import SamplingParams
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Request
from bdh.inference.state_metadata import read_metadata

if TYPE_CHECKING:
    from bdh.model import BDHState

ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0)  # as few as a request can write


@dataclass(frozen=True)
class Plan:
    """Something to be written.

    Attributes:
        text_request: The request for the engine.
        new: The tokens of what was given to read. The request's prompt has those that waited to be read, too.
        message: Whose answer it is to be, if it is one.
        answering: Whether what is written is an answer, or goes on with one.
    """

    text_request: TextRequest
    new: Sequence[int]
    message: dict[str, str] | None
    answering: bool


@dataclass(frozen=True)
class Reading:
    """Something to be read, and nothing written.

    Attributes:
        text_request: The request for the engine, whose state is to be kept; None if there is nothing for it to do.
        new: The tokens of what was given to read.
        before: The state to go on from.
        waiting: The tokens that are left for later: to go on, there must be one to read.
    """

    text_request: TextRequest | None
    new: Sequence[int]
    before: "BDHState | None"
    waiting: list[int]


@dataclass(frozen=True)
class Snapshot:
    """A session at a moment, for a file. Nothing that the session does later changes it.

    Attributes:
        state: As the session's.
        ahead: The state further on, if there is one.
        about: All else, as JSON.
    """

    state: "BDHState | None"
    ahead: "BDHState | None"
    about: str


@dataclass(frozen=True)
class SavedConversation:
    """What a file holds of a session; it has been checked."""

    state: "BDHState | None"
    ahead: "BDHState | None"
    about: dict[str, Any]


class Conversation:
    """A conversation, or any text that goes on, with a state of its own. One thing at a time.

    What it has said and heard is one sequence of tokens: those that `state` has read, then those in `unread`. Of an
    answer that was cut, by a stop string or because its iterator was closed, the tokens up to the cut count (of one
    that reaches across it, the text up to there), and a turn that was closed before its first piece has not happened.

    Plans only look at the session, which changes when what came of one is settled.

    Attributes:
        system: What the assistant is told before all else.
        params: For answers whose `send` or `write` has none.
        transcript: The messages of the conversation, without what `read` and `write` added in between.
        busy: Whether something is being read or written.
        owner: Whose kept beginnings of prompts it may use.
        client: Who asks for what is read or written next: clients have equal shares of the engine.
    """

    def __init__(self, prompt_encoder: PromptEncoder, system: str | None = None, params: SamplingParams | None = None):
        self.prompt_encoder = prompt_encoder  # for what it can do in any thread
        self.system = system
        self.params = params or SamplingParams()
        self.busy = False
        self.owner: str | None = None
        self.client: str | None = None
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
        return (0 if self.state is None else self.state.length) + len(self.unread)

    @property
    def nbytes(self) -> int:
        """Bytes that its states take in memory."""
        ahead = None if self.ahead is None else self.ahead[0]
        return sum(state.nbytes for state in (self.state, ahead) if state is not None)

    # ------------------------------------------------------------------------------------------------------ plans

    def _plan_send(self, message: dict[str, str], params: SamplingParams) -> Plan:
        chat, said = self.prompt_encoder.chat_format, self.transcript
        follows_reply = bool(said) and said[-1]["role"] == "assistant"
        check_messages([*said, message])
        (hidden,), found = self.prompt_encoder.spelled.hide([message])
        text = chat.following(said, hidden) if follows_reply else None
        if text is None:
            _, tokens = self.prompt_encoder.chat_tokens([*said, message])
        else:
            tokens = self.prompt_encoder.encode_rendered(text, found)
        again = follows_reply and text is None
        state, prompt = (None, tokens) if again else self._with(tokens)
        return Plan(self.prompt_encoder.as_chat_request(self._asked(state, prompt, params)), tokens, message, True)

    def _plan_write(self, text: str, params: SamplingParams) -> Plan:
        """To read a text, if there is one, and to write on."""
        tokens = self.prompt_encoder.encode(text, "the text")
        if self.ended and not tokens:
            raise BDHError("the last answer is complete; send a message, or let the session read something, to go on")
        if not self.unread and not tokens:
            raise BDHError("there is nothing to write on from; send a message, or let the session read something")
        text_request, answering = self._asked(*self._with(tokens), params), self.answering and not tokens
        if answering:
            text_request = replace(self.prompt_encoder.as_chat_request(text_request), strip=False)
        return Plan(text_request, tokens, None, answering)

    def _plan_read(self, text: str) -> Reading:
        tokens = self.prompt_encoder.encode(text, "the text")
        state, prompt = self._with(tokens)
        if not tokens or len(prompt) == 1:
            return Reading(None, tokens, state, prompt)
        request = Request(
            prompt[:-1], ONE_TOKEN, state=state, keep_state=True, prefix_owner=self.owner, client=self.client
        )
        return Reading(TextRequest(request), tokens, state, prompt[-1:])

    def _asked(self, state: "BDHState | None", prompt: list[int], params: SamplingParams) -> TextRequest:
        ends = self.prompt_encoder.end_token_ids
        request = Request(
            prompt,
            params,
            end_token_ids=ends,
            state=state,
            keep_state=True,
            prefix_owner=self.owner,
            client=self.client,
        )
        return TextRequest(request, stop=params.stop)

    def _with(self, tokens: list[int]) -> "tuple[BDHState | None, list[int]]":
        """What goes on with these tokens: the state furthest on, and what follows it."""
        unread = self.unread + tokens
        if self.ahead is not None:
            state, read = self.ahead
            if len(unread) > len(read) and unread[: len(read)] == read:
                return state, unread[len(read) :]
        return self.state, unread

    def _check_idle(self) -> None:
        if self.busy:
            raise BDHError("the last answer is not finished; take all of it, or close its iterator, before going on")

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        params = params or self.params
        for name in ("n", "best_of", "num_beams"):
            if (value := getattr(params, name)) not in (None, 1):
                raise BDHError(f"{name} is {value}; a session writes one answer at a time, so it must be 1")
        return params

    # ---------------------------------------------------------------------------------------- what came of a plan

    def _settle(self, plan: Plan, output: RequestOutput, text: str, whole: bool) -> None:
        """Takes what counts of an answer into the session: all of it, or the text that was handed on.

        Without either, as if it had not been planned.
        """
        if not whole and not text:
            return
        self.answering = plan.answering
        if plan.message is not None:
            self.transcript += [plan.message, {"role": "assistant", "content": ""}]
        if self.answering:
            self.transcript[-1]["content"] += text
        continuation, prompt = output.continuations[0], list(output.request.prompt)
        tokens = continuation.tokens
        if not whole or continuation.text.stopped:
            counting, rest = continuation.text.split_at(len(text))
            counting = counting + self.prompt_encoder.encode(rest)
        elif self.answering and tokens[-1] in output.request.ends:
            counting = tokens[:-1]  # the template says how an answer ends
        else:
            counting = tokens
        self.ended = self.answering and whole and continuation.finish_reason == "stop"
        said, read = prompt + counting, prompt + tokens[:-1]
        if continuation.state is None:
            self._go_to(output.request.state, said)
        elif said[: len(read)] == read and (len(said) > len(read) or self.ended):
            self._go_to(continuation.state, said[len(read) :])
        elif whole:
            self._go_to(output.request.state, said, ahead=(continuation.state, read))
        else:  # what was written and not handed on will hardly come again
            self._go_to(output.request.state, said)

    def _settle_reading(self, reading: Reading, after: "BDHState | None") -> None:
        """Takes what was read into the session; `after` is the state that the request left, if there was one."""
        if reading.new:
            self._go_to(reading.before if reading.text_request is None else after, reading.waiting)
            self.answering = self.ended = False

    def _go_to(
        self, state: "BDHState | None", unread: list[int], ahead: "tuple[BDHState, list[int]] | None" = None
    ) -> None:
        self.state, self.unread, self.ahead = state, unread, ahead

    # ------------------------------------------------------------------------------------------------------ on disk

    def _snapshot(self) -> Snapshot:
        """The session as it is. Raises BDHError while an answer is not finished."""
        self._check_idle()
        about = {
            "system": self.system,
            "params": as_json(self.params),
            "transcript": self.transcript,
            "unread": self.unread,
            "ahead": None if self.ahead is None else self.ahead[1],
            "answering": self.answering,
            "ended": self.ended,
        }
        return Snapshot(self.state, None if self.ahead is None else self.ahead[0], json.dumps(about))

    def _restore(self, saved: SavedConversation) -> None:
        """Becomes the session that a file holds."""
        about = saved.about
        self.system, self.params = about["system"], from_json(about["params"])
        self.transcript = about["transcript"]
        self._go_to(saved.state, about["unread"], None if saved.ahead is None else (saved.ahead, about["ahead"]))
        self.answering, self.ended = about["answering"], about["ended"]


def read_transcript(path: str | Path) -> list[dict[str, str]]:
    """The messages of a saved session. Raises BDHError if the file holds none."""
    try:
        transcript: list[dict[str, str]] = json.loads(read_metadata(path)["session"])["transcript"]
        return transcript
    except (KeyError, TypeError, ValueError) as error:
        raise BDHError(f"{path} holds no session") from error


def as_json(params: SamplingParams) -> dict[str, Any]:
    """Sampling params as JSON has them."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def from_json(values: dict[str, Any]) -> SamplingParams:
    """Sampling params that `as_json` made JSON of, where all keys are text."""
    bias = values["logit_bias"]
    return SamplingParams(**{**values, "logit_bias": bias and {int(token): value for token, value in bias.items()}})
