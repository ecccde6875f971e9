"""Sessions: conversations that keep their state, so that only new input is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.data.chat_format import check_messages
from bdh.inference import engine_rpc
from bdh.inference.conversation import Conversation, Plan
from bdh.inference.outputs import Delta
from bdh.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from bdh.inference.llm import LLM


class Session(Conversation):
    """A conversation, or any continued text, on an `LLM`. See `Conversation` for the effect of a cut reply."""

    def __init__(self, llm: "LLM", system: str | None = None, params: SamplingParams | None = None):
        super().__init__(llm, system, params)
        self.llm = llm

    def send(self, text: str, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Send a message to the assistant; stream its reply.

        Only the new message is read. If the chat template renders earlier messages differently now, the whole
        transcript is read again, without the texts of `read` and `write`.

        Raises:
            BDHError: The text or the params are invalid, the template refuses the message, or another reply is not
                finished.
        """
        message = {"role": "user", "content": text}
        check_messages([message])
        return self._send(message, self._checked(params))

    def read(self, text: str) -> None:
        """Read a text, such as a document, into the state without generating. Raises BDHError."""
        self._check_idle()
        reading = self._plan_read(text)
        after = None
        if reading.text_request is not None:
            output = self.llm.start(reading.text_request, wants_deltas=True)
            try:
                for _ in self.llm.pieces(output):
                    pass
            finally:
                self.llm.drop(output)
            after = output.continuations[0].state
        self._settle_reading(reading, after)

    def write(self, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue the text of the session; stream the continuation.

        After a reply that was cut, this continues the reply, also in the transcript; otherwise the text is not part of
        the transcript.

        Raises:
            BDHError: There is nothing to continue, or the last reply is complete; or as for `send`.
        """
        return self._write(self._checked(params))

    def _send(self, message: dict[str, str], params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        yield from self._turn(self._plan_send(message, params))

    def _write(self, params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        yield from self._turn(self._plan_write("", params))

    def _turn(self, plan: Plan) -> Iterator[Delta]:
        """Run a plan, and add its output to the session when it ends in any way."""
        output = self.llm.start(plan.text_request, wants_deltas=True)
        self.busy = True
        texts: list[str] = []
        try:
            for delta in self.llm.pieces(output):
                texts.append(delta.text)
                yield delta
        finally:
            self.busy = False
            self.llm.finish(output)
            self._settle(plan, output, "".join(texts), not output.unfinished and not output.deltas)

    def save(self, path: str | Path) -> None:
        """Save the session to a file atomically, for `LLM.load_session`.

        Raises:
            BDHError: A reply is not finished, or the file cannot be written; an older one is unchanged then.
        """
        engine_rpc.write_session(self.llm, self._snapshot(), path, {})

    @classmethod
    def load(cls, llm: "LLM", path: str | Path) -> "Session":
        """Load a session saved by `save`. Raises BDHError if it is invalid, or of another model."""
        session = cls(llm)
        session._restore(engine_rpc.read_session(llm, path))
        return session
