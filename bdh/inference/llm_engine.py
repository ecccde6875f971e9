"""Encodes text requests, runs them on the engine, and detokenizes the output; the base of `LLM`."""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.beams import beam_search, plain_request
from bdh.inference.constraint import Grammars
from bdh.inference.engine import Engine
from bdh.inference.outputs import Completion, Delta, RequestOutput, TextRequest
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Event, Request
from bdh.inference.runner import Runner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHConfig, BDHForCausalLM

log = logging.getLogger(__name__)


class LLMEngine(PromptEncoder):
    """Encodes prompts, steps the engine, and detokenizes its output. Not thread-safe.

    Several callers may have requests at the same time; each call of `step` advances all of them.

    Args:
        runner: The model and its slots.
        tokenizer: The model's tokenizer.
        model: The model for beam search, or None.
        end_token_ids: Tokens that end a text.
        prefix_cache_bytes: Size limit of the prefix cache.
        queue_size: Continuations that may wait for a slot.

    Attributes:
        name: The model's name in messages to users.
        notify: Called once with a line when a model without decay has read past its training block.
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
        self.outputs: dict[str, RequestOutput] = {}  # of unfinished requests, by id
        self._stepping = False
        self._dropped: deque[str] = deque()

    def check(self, text_request: TextRequest) -> None:
        """Raise BDHError if the engine, or beam search, would refuse the request."""
        request = text_request.request
        if request.params.num_beams > 1:
            request = plain_request(self.model, request)
        self.prepare(request)
        self.engine.check(request)
        self.engine.constraint(request)

    def start(self, text_request: TextRequest, wants_deltas: bool = False) -> RequestOutput:
        """Queue a request in the engine. Raises BDHError, or QueueFull, if the engine refuses it."""
        self.prepare(text_request.request)
        self.engine.check(text_request.request)  # first: an output takes memory for each continuation
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
        """Step the engine and add the tokens to the outputs. Ctrl-C waits for the end of the step.

        After an exception, all requests end with it, and the engine is restarted.
        """
        with uninterrupted():
            self._stepping = True
            try:
                for event in self.engine.step():
                    self._add_event(event)
            except Exception as error:
                self.restart_engine(error)
                raise
            finally:
                self._stepping = False
            while self._dropped:
                self.engine.cancel(self._dropped.popleft())
            self.check_length(self.engine.longest_position)

    def drop(self, output: RequestOutput) -> None:
        """End a request; its output no longer changes."""
        with uninterrupted():
            if self.outputs.pop(output.request.id, None) is None:
                return
            if self._stepping:  # the garbage collector closed an iterator during a step
                self._dropped.append(output.request.id)
            else:
                self.engine.cancel(output.request.id)

    def finish(self, output: RequestOutput) -> None:
        """End a request as `drop` does, and store the states of its unfinished continuations if it keeps them."""
        with uninterrupted():
            if output.request.id in self.outputs and not self._stepping:
                for continuation in output.continuations:
                    if continuation.finish_reason is None:
                        continuation.state = self.engine.finish(output.request.id, continuation.index)
        self.drop(output)

    def pieces(self, output: RequestOutput) -> Iterator[Delta]:
        """Yield the deltas of a request, stepping the engine as needed."""
        while True:
            while output.deltas:
                yield output.deltas.popleft()
            if output.error is not None:
                raise output.error
            if not output.unfinished:
                return
            self.step()

    def run(self, text_requests: Sequence[TextRequest]) -> Iterator[tuple[int, Completion]]:
        """Yield completions and their indices as they finish, queueing requests as slots become free.

        A request that fails has an error in its completion and does not affect the others. Closing the iterator ends
        the remaining requests. Raises BDHError if the engine refuses a request.
        """
        waiting = deque(enumerate(text_requests))
        running: dict[int, RequestOutput] = {}
        try:
            while waiting or running:
                while waiting and len(self.engine.waiting) < self.runner.n_slots:
                    number, text_request = waiting.popleft()
                    if text_request.request.params.num_beams > 1:
                        yield number, self.beam_search(text_request)
                    else:
                        running[number] = self.start(text_request)
                if running or waiting:  # other callers' requests may fill the queue
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
        """Yield the text of a request piece by piece, starting with the first `next`. Raises BDHError as `check`."""
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
        """Run a beam search, during which the engine does not step. Raises BDHError as `check`."""
        self.check(text_request)
        assert self.model is not None
        completion = beam_search(self.model, self.tokenizer, text_request)
        written = max(len(choice.tokens) for choice in completion.choices)
        self.check_length(len(text_request.request.prompt) + written)
        return completion

    def check_length(self, position: int) -> None:
        """Notify the first time that a sequence exceeds the reliable length of the model."""
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
        """Compiler of regular expressions and JSON schemas for this tokenizer. Thread-safe."""
        return Grammars(self.tokenizer, self.vocab_size)

    def prepare_grammar(self, params: SamplingParams) -> None:
        """Compile the grammar of a request ahead of `start`. Thread-safe. Raises BDHError."""
        self.grammars.constraint(params)

    def prepare(self, request: Request) -> None:
        """Give the engine its grammar compiler if the request needs it."""
        if request.params.regex is not None or request.params.json_schema is not None:
            self.engine.grammars = self.grammars

    def _add_event(self, event: Event) -> None:
        output = self.outputs.get(event.request_id)
        if output is None:
            return
        if event.error is not None:
            output.error = event.error
            self.engine.cancel(event.request_id)
        elif output.take(event):  # at a stop string, which the engine does not see
            output.continuations[event.index].state = self.engine.finish(event.request_id, event.index)
        if output.error is not None or not output.unfinished:
            del self.outputs[event.request_id]

    def restart_engine(self, error: Exception) -> None:
        """End all requests with an error, and create a new engine."""
        for output in self.outputs.values():
            output.error = error
        self.outputs.clear()
        self._dropped.clear()
        old, self.engine = self.engine, self._new_engine()
        old.prefixes.states.clear()  # the traceback holds the old engine; free its states
        old.groups.clear()
        for sequences in (old.waiting, old.reading, old.writing):
            sequences.clear()


def reliable_length(config: BDHConfig) -> int | None:
    """Return the length up to which a model without decay is reliable: its training block. Otherwise None."""
    return config.training_block_size if config.decay == "none" else None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Does nothing outside the main thread, which alone gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
