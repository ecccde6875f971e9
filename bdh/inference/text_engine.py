"""Text requests on one engine: what `LLM` and `Session` drive, and `AsyncLLM` has driven in a thread."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.answer import Answer, Completion, Delta, TextRequest
from bdh.inference.beams import beam_search, plain_request
from bdh.inference.constraint import Grammars
from bdh.inference.engine import Engine
from bdh.inference.interrupt import uninterrupted
from bdh.inference.params import SamplingParams
from bdh.inference.request import Event, Request
from bdh.inference.runner import Runner
from bdh.inference.texts import Texts
from bdh.model import BDHConfig, BDHForCausalLM

log = logging.getLogger(__name__)


class TextEngine(Texts):
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
        self.answers: dict[str, Answer] = {}  # of requests in work
        self._stepping = False
        self._dropped: deque[str] = deque()

    # ------------------------------------------------------------------------------- work; for one thread at a time

    def check(self, asked: TextRequest) -> None:
        """Raises BDHError if the engine, or the beam search, would not take the request."""
        request = asked.request
        if request.params.num_beams > 1:
            request = plain_request(self.model, request)
        self.prepare(request)
        self.engine.check(request)
        self.engine.constraint(request)

    def start(self, asked: TextRequest, wants_deltas: bool = False) -> Answer:
        """Gives a request to the engine. Raises BDHError (QueueFull among them) if it does not take it."""
        self.prepare(asked.request)
        self.engine.check(asked.request)  # first, as an answer takes memory for each of its continuations
        answer = Answer(asked, self.tokenizer, wants_deltas)
        try:
            with uninterrupted():
                self.engine.add(asked.request)
                self.answers[asked.request.id] = answer
        except KeyboardInterrupt:
            self.drop(answer)
            raise
        return answer

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
                self.begin_anew(error)
                raise
            finally:
                self._stepping = False
            while self._dropped:
                self.engine.cancel(self._dropped.popleft())
            self.check_length(self.engine.longest_position)

    def drop(self, answer: Answer) -> None:
        """Ends what is left of a request; nothing more comes of it."""
        with uninterrupted():
            if self.answers.pop(answer.request.id, None) is None:
                return
            if self._stepping:  # an iterator that is closed by the garbage collector, in the middle of a step
                self._dropped.append(answer.request.id)
            else:
                self.engine.cancel(answer.request.id)

    def finish(self, answer: Answer) -> None:
        """As `drop`, and continuations that were going on get the states they left, if the request keeps them."""
        with uninterrupted():
            if answer.request.id in self.answers and not self._stepping:
                for continuation in answer.continuations:
                    if continuation.finish_reason is None:
                        continuation.state = self.engine.finish(answer.request.id, continuation.index)
        self.drop(answer)

    def pieces(self, answer: Answer) -> Iterator[Delta]:
        """The deltas of an answer as they come, driving the engine meanwhile."""
        while True:
            while answer.deltas:
                yield answer.deltas.popleft()
            if answer.error is not None:
                raise answer.error
            if not answer.unfinished:
                return
            self.step()

    def run(self, asked: Sequence[TextRequest]) -> Iterator[tuple[int, Completion]]:
        """Completions as they get ready, with their numbers. Feeds the engine as its slots get free.

        One that cannot go on has an error in its completion, and the others do go on. Letting go of the iterator ends
        the rest. Raises BDHError where the engine does not take one.
        """
        waiting = deque(enumerate(asked))
        running: dict[int, Answer] = {}
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
                for number, answer in list(running.items()):
                    if answer.error is not None and not isinstance(answer.error, BDHError):
                        raise answer.error
                    if answer.error is not None or not answer.unfinished:
                        yield number, running.pop(number).completion()
        finally:
            for answer in running.values():
                self.drop(answer)

    def stream_of(self, asked: TextRequest) -> Iterator[Delta]:
        """Pieces of a request's text as they come, begun when the first is asked for. Raises BDHError as `check`."""
        self.check_streamable(asked)
        self.check(asked)
        return self._started(asked)

    def _started(self, asked: TextRequest) -> Iterator[Delta]:
        answer = self.start(asked, wants_deltas=True)
        try:
            yield from self.pieces(answer)
        finally:
            self.drop(answer)

    def beam_search(self, asked: TextRequest) -> Completion:
        """The likeliest continuations; nothing else goes on meanwhile. Raises BDHError as `check`."""
        self.check(asked)
        assert self.model is not None
        completion = beam_search(self.model, self.tokenizer, asked)
        written = max(len(choice.tokens) for choice in completion.choices)
        self.check_length(len(asked.request.prompt) + written)
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
        answer = self.answers.get(event.request_id)
        if answer is None:
            return
        if event.error is not None:
            answer.error = event.error
            self.engine.cancel(event.request_id)
        elif answer.take(event):  # a stop string, of which the engine knows nothing
            answer.continuations[event.index].state = self.engine.finish(event.request_id, event.index)
        if answer.error is not None or not answer.unfinished:
            del self.answers[event.request_id]

    def begin_anew(self, error: Exception) -> None:
        """Ends all requests by an error, and takes a new engine."""
        for answer in self.answers.values():
            answer.error = error
        self.answers.clear()
        self._dropped.clear()
        old, self.engine = self.engine, self._new_engine()
        old.prefixes.states.clear()  # the error's traceback keeps the old engine, but not its states
        old.groups.clear()
        for branches in (old.waiting, old.reading, old.writing):
            branches.clear()


def reliable_length(config: BDHConfig) -> int | None:
    """Tokens up to which a model is reliable: its training block, if it has no decay; None for no limit, or unknown."""
    return config.training_block_size if config.decay == "none" else None
