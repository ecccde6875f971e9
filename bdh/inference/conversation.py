"""State and transcript of a session, independent of how its engine is driven."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.data.chat_format import check_messages
from bdh.errors import BDHError
from bdh.inference.outputs import RequestOutput, TextRequest
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Request
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.state_metadata import read_metadata

if TYPE_CHECKING:
    from bdh.model import BDHState

ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0)  # the minimum of a request


@dataclass(frozen=True)
class Plan:
    """A planned generation.

    Attributes:
        text_request: The request to the engine. Its prompt starts with tokens left unread before.
        new: Tokens of the new input.
        message: The message to reply to, if there is one.
        answering: Whether the output is a reply, or continues one.
    """

    text_request: TextRequest
    new: Sequence[int]
    message: dict[str, str] | None
    answering: bool


@dataclass(frozen=True)
class ReadPlan:
    """Input that is planned to be read without generating.

    Attributes:
        text_request: The request to the engine, which keeps its state; None if nothing has to be read now.
        new: Tokens of the new input.
        before: State to start from.
        unread: Tokens left for later: a request needs at least one token to read.
    """

    text_request: TextRequest | None
    new: Sequence[int]
    before: "BDHState | None"
    unread: list[int]


@dataclass(frozen=True)
class Snapshot:
    """Immutable copy of a session, to be saved.

    Attributes:
        state: State of the session.
        ahead: State ahead of it, if there is one.
        about: Everything else, as JSON.
    """

    state: "BDHState | None"
    ahead: "BDHState | None"
    about: str


@dataclass(frozen=True)
class SavedConversation:
    """Validated contents of a session file."""

    state: "BDHState | None"
    ahead: "BDHState | None"
    about: dict[str, Any]


class Conversation:
    """A conversation, or any continued text, with its own state. It runs one operation at a time.

    Its content is one sequence of tokens: those that `state` has read, then those in `unread`. If a reply is cut, by a
    stop string or by closing its iterator, its tokens count up to the cut; a token across the cut is replaced by its
    text before the cut. A turn that is closed before its first piece has no effect.

    Planning does not change the session; settling the result of a plan does.

    Attributes:
        system: System message.
        params: Default params of `send` and `write`.
        transcript: Messages of the conversation, without the texts of `read` and `write`.
        busy: Whether an operation is running.
        owner: Owner of the entries of the prefix cache that it may use.
        client: Client that is charged for the next operation; clients have equal shares of the engine.
    """

    def __init__(self, prompt_encoder: PromptEncoder, system: str | None = None, params: SamplingParams | None = None):
        self.prompt_encoder = prompt_encoder  # thread-safe
        self.system = system
        self.params = params or SamplingParams()
        self.busy = False
        self.owner: str | None = None
        self.client: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message. Raises BDHError while a reply is not finished."""
        self._check_idle()
        self.transcript: list[dict[str, str]] = []
        if self.system is not None:
            self.transcript.append({"role": "system", "content": self.system})
        self.state: BDHState | None = None  # None: nothing was read
        self.unread: list[int] = []  # tokens after `state`
        # A later state, and the tokens it has read after `state`. Some of them, of a stop string, do not count; but if
        # the next input begins with all of them, they need not be read again.
        self.ahead: tuple[BDHState, list[int]] | None = None
        self.answering = False  # whether the last message is a reply that `write` can continue
        self.ended = False  # whether the last reply is complete

    @property
    def position(self) -> int:
        """Number of tokens so far."""
        return (0 if self.state is None else self.state.length) + len(self.unread)

    @property
    def nbytes(self) -> int:
        """Size of its states in bytes."""
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
        return Plan(self.prompt_encoder.as_chat_request(self._request(state, prompt, params)), tokens, message, True)

    def _plan_write(self, text: str, params: SamplingParams) -> Plan:
        """Plan to read a text, if there is one, and to continue it."""
        tokens = self.prompt_encoder.encode(text, "the text")
        if self.ended and not tokens:
            raise BDHError("the last answer is complete; send a message, or let the session read something, to go on")
        if not self.unread and not tokens:
            raise BDHError("there is nothing to write on from; send a message, or let the session read something")
        text_request, answering = self._request(*self._with(tokens), params), self.answering and not tokens
        if answering:
            text_request = replace(self.prompt_encoder.as_chat_request(text_request), strip=False)
        return Plan(text_request, tokens, None, answering)

    def _plan_read(self, text: str) -> ReadPlan:
        tokens = self.prompt_encoder.encode(text, "the text")
        state, prompt = self._with(tokens)
        if not tokens or len(prompt) == 1:
            return ReadPlan(None, tokens, state, prompt)
        request = Request(
            prompt[:-1], ONE_TOKEN, state=state, keep_state=True, prefix_owner=self.owner, client=self.client
        )
        return ReadPlan(TextRequest(request), tokens, state, prompt[-1:])

    def _request(self, state: "BDHState | None", prompt: list[int], params: SamplingParams) -> TextRequest:
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
        """Return the latest usable state, and the tokens to read after it, ending with these."""
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

    # ------------------------------------------------------------------------------------------------- results

    def _settle(self, plan: Plan, output: RequestOutput, text: str, whole: bool) -> None:
        """Add an output to the session: all of it, or the text that the caller received.

        Without any text, the session does not change.
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
            counted, rest = continuation.text.split_at(len(text))
            counted = counted + self.prompt_encoder.encode(rest)
        elif self.answering and tokens[-1] in output.request.ends:
            counted = tokens[:-1]  # the chat template ends the reply
        else:
            counted = tokens
        self.ended = self.answering and whole and continuation.finish_reason == "stop"
        content, read = prompt + counted, prompt + tokens[:-1]
        if continuation.state is None:
            self._go_to(output.request.state, content)
        elif content[: len(read)] == read and (len(content) > len(read) or self.ended):
            self._go_to(continuation.state, content[len(read) :])
        elif whole:
            self._go_to(output.request.state, content, ahead=(continuation.state, read))
        else:  # the rest was not received, and is unlikely to recur
            self._go_to(output.request.state, content)

    def _settle_reading(self, reading: ReadPlan, after: "BDHState | None") -> None:
        """Add read input to the session; `after` is the state after the request, if there was one."""
        if reading.new:
            self._go_to(reading.before if reading.text_request is None else after, reading.unread)
            self.answering = self.ended = False

    def _go_to(
        self, state: "BDHState | None", unread: list[int], ahead: "tuple[BDHState, list[int]] | None" = None
    ) -> None:
        self.state, self.unread, self.ahead = state, unread, ahead

    # ------------------------------------------------------------------------------------------------------ on disk

    def _snapshot(self) -> Snapshot:
        """Return a copy of the session. Raises BDHError while a reply is not finished."""
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
        """Take over the contents of a session file."""
        about = saved.about
        self.system, self.params = about["system"], from_json(about["params"])
        self.transcript = about["transcript"]
        self._go_to(saved.state, about["unread"], None if saved.ahead is None else (saved.ahead, about["ahead"]))
        self.answering, self.ended = about["answering"], about["ended"]


def read_transcript(path: str | Path) -> list[dict[str, str]]:
    """Return the messages of a saved session. Raises BDHError if the file has none."""
    try:
        transcript: list[dict[str, str]] = json.loads(read_metadata(path)["session"])["transcript"]
        return transcript
    except (KeyError, TypeError, ValueError) as error:
        raise BDHError(f"{path} holds no session") from error


def as_json(params: SamplingParams) -> dict[str, Any]:
    """Convert sampling params to JSON values."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def from_json(values: dict[str, Any]) -> SamplingParams:
    """Convert the result of `as_json`, whose keys are all strings in a file, back to sampling params."""
    bias = values["logit_bias"]
    return SamplingParams(**{**values, "logit_bias": bias and {int(token): value for token, value in bias.items()}})
