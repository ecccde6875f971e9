"""Sessions: conversations whose synapses stay, so that only what is new is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.data.chat_format import check_messages
from bdh.inference import engine_rpc
from bdh.inference.conversation import Conversation, Plan
from bdh.inference.outputs import Delta
from bdh.inference.params import SamplingParams

if TYPE_CHECKING:
    from bdh.inference.llm import LLM


class Session(Conversation):
    """A conversation, or any text that goes on, on an `LLM`. See `Conversation` for what counts of a cut answer."""

    def __init__(self, llm: "LLM", system: str | None = None, params: SamplingParams | None = None):
        super().__init__(llm, system, params)
        self.llm = llm

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
        """Writes on from where the session is; yields the text as it comes.

        After an answer that was cut short this goes on with the answer, and the transcript has it; else it is text that
        the transcript knows nothing of.

        Raises:
            BDHError: There is nothing to go on from, or the last answer is complete; or as for `send`.
        """
        return self._write(self._checked(params))

    def _send(self, message: dict[str, str], params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        yield from self._turn(self._plan_send(message, params))

    def _write(self, params: SamplingParams) -> Iterator[Delta]:
        self._check_idle()
        yield from self._turn(self._plan_write("", params))

    def _turn(self, plan: Plan) -> Iterator[Delta]:
        """Has what is planned written. The session goes on from it when it is over, however that comes about."""
        output = self.llm.start(plan.text_request, wants_deltas=True)
        self.busy = True
        given: list[str] = []
        try:
            for delta in self.llm.pieces(output):
                given.append(delta.text)
                yield delta
        finally:
            self.busy = False
            self.llm.finish(output)
            self._settle(plan, output, "".join(given), not output.unfinished and not output.deltas)

    def save(self, path: str | Path) -> None:
        """Writes the session to a file, whole or not at all, for `LLM.load_session`.

        Raises:
            BDHError: An answer is not finished, or the file cannot be written; an older one is then as it was.
        """
        engine_rpc.write_session(self.llm, self._snapshot(), path, {})

    @classmethod
    def load(cls, llm: "LLM", path: str | Path) -> "Session":
        """Reads a session that `save` wrote. Raises BDHError if it is not one, or is of another model."""
        session = cls(llm)
        session._restore(engine_rpc.read_session(llm, path))
        return session
