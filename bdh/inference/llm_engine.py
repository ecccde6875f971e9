"""Text requests on one engine: what `LLM` and `Session` drive, and `AsyncLLM` has driven in a thread."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.beams import beam_search, plain_request
from bdh.inference.constraint import Grammars
from bdh.inference.engine import Engine
from bdh.inference.interrupt import uninterrupted
from bdh.inference.outputs import Completion, Delta, RequestOutput, TextRequest
from bdh.inference.params import SamplingParams
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Event, Request
from bdh.inference.runner import Runner
from bdh.model import BDHConfig, BDHForCausalLM

log = logging.getLogger(__name__)


class LLMEngine(PromptEncoder):
    """Makes requests of texts, gives them to an engine, drives it, and makes text of what comes. For one thread.

    Several requests may be in work, begun by different callers: whoever calls `step` lets all of them go on.

    Args:
        runner: The model and its slots.
        tokenizer: Its tokenizer.
        model: What beam search is done with, if there is such a model.
        end_token_ids: Tokens that end a text.
        prefix_cache_bytes: What kept states of prompts' beginnings may take.
        queue_size: Continuations that may wait for a slot.

    Attributes:
        name: The model's, for messages to users.
        notify: Called once with a line, when a model without decay has read past the block that it was trained on.
    """

    name = "MODEL"

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerFast,
        model: BDHForCausalLM | None,
        end_token_ids: tuple[int, ...],
        prefix_cache_bytes: int,
        queue_size: int,
    ):
        super().__init__(tokenizer, runner.config.vocab_size, end_token_ids)
        self.runner = runner
        self.model = model
        self.prefix_cache_bytes = prefix_cache_bytes
        self.queue_size = queue_size
        self.notify: Callable[[str], None] = log.warning
        self._reliable_length = reliable_length(runner.config)
        self.engine = self._new_engine()
        self.outputs: dict[str, RequestOutput] = {}  # of requests in work
        self._stepping = False
        self._dropped: deque[str] = deque()

    # ------------------------------------------------------------------------------- work; for one thread at a time

    def check(self, text_request: TextRequest) -> None:
        """Raises BDHError if the engine, or the beam search, would not take the request."""
        request = text_request.request
        if request.params.num_beams > 1:
            request = plain_request(self.model, request)
        self.prepare(request)
        self.engine.check(request)
        self.engine.constraint(request)

    def start(self, text_request: TextRequest, wants_deltas: bool = False) -> RequestOutput:
        """Gives a request to the engine. Raises BDHError (QueueFull among them) if it does not take it."""
        self.prepare(text_request.request)
        self.engine.check(text_request.request)  # first, as an answer takes memory for each of its continuations
        output = RequestOutput(text_request, self.tokenizer, wants_deltas)
        try:
            with uninterrupted():
                self.engine.add(text_request.request)
                self.outputs[text_request.request.id] = output
        except KeyboardInterrupt:
            self.drop(output)
            raise
        return output

    def step(self) -> None:
        """One step of the engine; what comes of it goes to the answers. Ctrl-C waits for its end.

        An exception ends all requests: they get it too, and the engine begins anew.
        """
        with uninterrupted():
            self._stepping = True
            try:
                for event in self.engine.step():
                    self._hand_out(event)
            except Exception as error:
                self.restart_engine(error)
                raise
            finally:
                self._stepping = False
            while self._dropped:
                self.engine.cancel(self._dropped.popleft())
            self.check_length(self.engine.longest_position)

    def drop(self, output: RequestOutput) -> None:
        """Ends what is left of a request; nothing more comes of it."""
        with uninterrupted():
            if self.outputs.pop(output.request.id, None) is None:
                return
            if self._stepping:  # an iterator that is closed by the garbage collector, in the middle of a step
                self._dropped.append(output.request.id)
            else:
                self.engine.cancel(output.request.id)

    def finish(self, output: RequestOutput) -> None:
        """As `drop`, and continuations that were going on get the states they left, if the request keeps them."""
        with uninterrupted():
            if output.request.id in self.outputs and not self._stepping:
                for continuation in output.continuations:
                    if continuation.finish_reason is None:
                        continuation.state = self.engine.finish(output.request.id, continuation.index)
        self.drop(output)

    def pieces(self, output: RequestOutput) -> Iterator[Delta]:
        """The deltas of an answer as they come, driving the engine meanwhile."""
        while True:
            while output.deltas:
                yield output.deltas.popleft()
            if output.error is not None:
                raise output.error
            if not output.unfinished:
                return
            self.step()

    def run(self, text_request: Sequence[TextRequest]) -> Iterator[tuple[int, Completion]]:
        """Completions as they get ready, with their numbers. Feeds the engine as its slots get free.

        One that cannot go on has an error in its completion, and the others do go on. Letting go of the iterator ends
        the rest. Raises BDHError where the engine does not take one.
        """
        waiting = deque(enumerate(text_request))
        running: dict[int, RequestOutput] = {}
        try:
            while waiting or running:
                while waiting and len(self.engine.waiting) < self.runner.n_slots:
                    number, one = waiting.popleft()
                    if one.request.params.num_beams > 1:
                        yield number, self.beam_search(one)
                    else:
                        running[number] = self.start(one)
                if running or waiting:  # there may be no room because of others, who then go on
                    self.step()
                for number, output in list(running.items()):
                    if output.error is not None and not isinstance(output.error, BDHError):
                        raise output.error
                    if output.error is not None or not output.unfinished:
                        yield number, running.pop(number).completion()
        finally:
            for output in running.values():
                self.drop(output)

    def stream_of(self, text_request: TextRequest) -> Iterator[Delta]:
        """Pieces of a request's text as they come, begun when the first is asked for. Raises BDHError as `check`."""
        self.check_streamable(text_request)
        self.check(text_request)
        return self._started(text_request)

    def _started(self, text_request: TextRequest) -> Iterator[Delta]:
        output = self.start(text_request, wants_deltas=True)
        try:
            yield from self.pieces(output)
        finally:
            self.drop(output)

    def beam_search(self, text_request: TextRequest) -> Completion:
        """The likeliest continuations; nothing else goes on meanwhile. Raises BDHError as `check`."""
        self.check(text_request)
        assert self.model is not None
        completion = beam_search(self.model, self.tokenizer, text_request)
        written = max(len(choice.tokens) for choice in completion.choices)
        self.check_length(len(text_request.request.prompt) + written)
        return completion

    def check_length(self, position: int) -> None:
        """Notifies, the first time that a sequence is longer than the model is reliable for."""
        if self._reliable_length is not None and position > self._reliable_length:
            hint = ""
            if self.runner.config.write == "add":
                hint = f"; bdh calibrate {self.name} --data.path TEXT --output DIR gives it a decay"
            self.notify(
                f"{self.name} has read past the {self._reliable_length:,} tokens of its training block, and has no "
                f"decay: its text becomes unreliable{hint}"
            )
            self._reliable_length = None

    def _new_engine(self) -> Engine:
        return Engine(self.runner, queue_size=self.queue_size, prefix_cache_bytes=self.prefix_cache_bytes)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles regular expressions and schemas for this tokenizer; for any thread."""
        return Grammars(self.tokenizer, self.vocab_size)

    def prepare_grammar(self, params: SamplingParams) -> None:
        """Compiles what constrains a request, so that `start` finds it ready; for any thread. Raises BDHError."""
        self.grammars.constraint(params)

    def prepare(self, request: Request) -> None:
        """Gives the engine grammars when the first request needs them."""
        if request.params.regex is not None or request.params.json_schema is not None:
            self.engine.grammars = self.grammars

    def _hand_out(self, event: Event) -> None:
        output = self.outputs.get(event.request_id)
        if output is None:
            return
        if event.error is not None:
            output.error = event.error
            self.engine.cancel(event.request_id)
        elif output.take(event):  # a stop string, of which the engine knows nothing
            output.continuations[event.index].state = self.engine.finish(event.request_id, event.index)
        if output.error is not None or not output.unfinished:
            del self.outputs[event.request_id]

    def restart_engine(self, error: Exception) -> None:
        """Ends all requests by an error, and takes a new engine."""
        for output in self.outputs.values():
            output.error = error
        self.outputs.clear()
        self._dropped.clear()
        old, self.engine = self.engine, self._new_engine()
        old.prefixes.states.clear()  # the error's traceback keeps the old engine, but not its states
        old.groups.clear()
        for sequences in (old.waiting, old.reading, old.writing):
            sequences.clear()


def reliable_length(config: BDHConfig) -> int | None:
    """Tokens up to which a model is reliable: its training block, if it has no decay; None for no limit, or unknown."""
    return config.training_block_size if config.decay == "none" else None
