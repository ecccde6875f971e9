"""The engine: many requests at once, token ids in, token ids out.

What is notable about it, for a reader who knows engines for transformers:

* There are no pages and no blocks. A sequence's past is one state of constant size, so a *slot* is all it needs, and
  who has a slot can go on for ever. Scheduling is: who gets the next free slot.
* Slots are shared evenly among clients, not among requests: one that has more than its share gives up a slot to another
  that waits, and goes on later from the state it had, which is all there is to put aside.
* Requests join and leave between steps. A step reads `prefill_chunk` tokens of prompts, in turn, and writes one
  token of every continuation whose prompt is read; so a long prompt delays the others by one chunk.
* States are exact. The state after a prompt serves all `n` answers to it, and the state after a common beginning of
  prompts is kept and copied instead of read again.
* A request's tokens depend on its prompt, its settings and its seed, never on who is beside it: the rows of a batch
  never meet in the model, and each draws with random numbers of its own.
"""

import heapq
import random
from collections import Counter, deque
from dataclasses import replace

import torch
from torch import Tensor

from bdh.errors import BDHError, QueueFull
from bdh.inference.constraint import Constraint, Grammars
from bdh.inference.prefix import PrefixCache
from bdh.inference.request import Event, FinishReason, PromptLogprobs, Request
from bdh.inference.runner import Runner
from bdh.inference.sampling import Sampled, Sampler
from bdh.inference.scheduling import Sequence, SequenceGroup, WaitingQueue, client_to_preempt
from bdh.inference.scoring import score_tokens
from bdh.inference.stats import EngineStats, queue_has_room
from bdh.model import BDHState


class Engine:
    """Runs requests on a runner's slots; call `step` while it is `busy`. Not for several threads at once.

    Args:
        runner: The model and its slots.
        grammars: What compiles regular expressions and schemas; without it, constrained requests are refused.
        queue_size: Continuations that may wait for a slot; one more is refused.
        prefill_chunk: Tokens of prompts read in one step, less than twice as many at times; a multiple of the runner's
            `prefill_alignment`. None: the runner's own chunk.
        prefix_cache_bytes: What kept states may take; 0 keeps none.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        grammars: Grammars | None = None,
        queue_size: int = 4096,
        prefill_chunk: int | None = None,
        prefix_cache_bytes: int = 1 << 30,
    ):
        self.runner = runner
        self.grammars = grammars
        self.queue_size = queue_size
        self.prefill_chunk = prefill_chunk or runner.prefill_chunk
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self.sampler = Sampler(runner.n_slots, runner.config.vocab_size, runner.device)
        self.groups: dict[str, SequenceGroup] = {}
        self.waiting = WaitingQueue()
        self.reading: deque[Sequence] = deque()  # have a slot, read their prompt
        self.writing: list[Sequence] = []  # have a slot and a last token to go on from
        self.free = list(range(runner.n_slots))  # a heap
        self.slots_of: Counter[str | None] = Counter()  # how many slots each client has, of those that have some
        self.counts = EngineStats()
        self.longest_position = 0  # tokens of the longest sequence that was read so far

    @property
    def busy(self) -> bool:
        return bool(self.groups)

    @property
    def stats(self) -> EngineStats:
        """The counts and the load as they are now."""
        running = len(self.reading) + len(self.writing)
        return replace(
            self.counts,
            running=running,
            waiting=len(self.waiting),
            prefix_nbytes=self.prefixes.nbytes,
            preempted_nbytes=self.waiting.preempted * self.runner.state_nbytes,
            slots_nbytes=self.runner.slots_nbytes,
            waiting_of=dict.fromkeys(self.slots_of, 0)
            | {name: len(queue) for name, queue in self.waiting.queues.items()},
        )

    def release(self) -> None:
        """Gives memory that no request uses back to the system, but for the kept beginnings of prompts."""
        if not self.busy:
            self.runner.release()

    # ---------------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> str:
        """Queues a request; returns its id.

        Raises:
            QueueFull: Too many wait.
            BDHError: The prompt is empty or has unknown tokens, or the settings do not fit the model.
        """
        params, count = request.params, request.params.best_of or request.params.n
        self.check(request)
        if not queue_has_room(self.stats, request.client, count, self.queue_size, len(self.free)):
            raise QueueFull(
                f"{len(self.waiting)} requests wait already, of {self.queue_size} that may; try again later"
            )
        seed = random.getrandbits(63) if params.seed is None else params.seed
        sequences = [
            Sequence(request, index, (seed + index) % 2**63, self.constraint(request)) for index in range(count)
        ]
        self.groups[request.id] = SequenceGroup(sequences)
        self.waiting.extend(sequences)
        return request.id

    def check(self, request: Request) -> None:
        size = self.runner.config.vocab_size
        if request.id in self.groups:
            raise BDHError(f"a request {request.id} is in work already; give each an id of its own")
        if not request.prompt:
            raise BDHError("the prompt is empty; give at least one token to go on from")
        if not 0 <= min(request.prompt) <= max(request.prompt) < size:
            raise BDHError(f"the prompt has a token that the model does not know; its tokens are 0 to {size - 1}")
        if (count := request.params.best_of or request.params.n) > self.queue_size + self.runner.n_slots:
            most = self.queue_size + self.runner.n_slots
            raise BDHError(f"{count} continuations of one prompt are more than can ever wait; ask for {most} at most")
        if request.state is not None:
            self.check_state(request.state)
        if request.params.num_beams > 1:
            raise BDHError("num_beams is not for the engine; beam search is generate()'s")
        request.params.check_vocabulary(size)

    def check_state(self, state: BDHState) -> None:
        config = self.runner.config
        shape = (1, config.n_head, config.neurons_per_head, config.n_embd)
        if len(state.synapses) != config.n_layer or any(S.shape != shape for S in state.synapses):
            raise BDHError(
                f"the state is not one sequence of this model: it wants {config.n_layer} synapses of {shape}"
            )

    def constraint(self, request: Request) -> Constraint | None:
        if request.params.regex is None and request.params.json_schema is None:
            return None
        if self.grammars is None:
            raise BDHError("regex and json_schema need a tokenizer; give the engine its grammars")
        constraint = self.grammars.constraint(request.params)
        if constraint is not None and not constraint.allowed().any():
            raise BDHError("regex or json_schema allows nothing but an empty text; give one that text can follow")
        return constraint

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its continuations, at once: its slot is free for others, no event of it follows."""
        group = self.groups.get(request_id)
        for sequence in list(group.sequences) if group else []:
            if index is None or sequence.index == index:
                self.counts.cancelled += 1
                self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Takes a continuation out of wherever it is."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            (self.writing if sequence.prompt_is_read else self.reading).remove(sequence)
            self.free_slot(sequence)
        group = self.groups[sequence.request.id]
        group.sequences.remove(sequence)
        if group.reader is sequence:  # the next of the group reads the prompt
            group.reader = None
        if all(other.prompt_is_read for other in group.sequences):
            group.after_prompt = None
        if not group.sequences:
            del self.groups[sequence.request.id]

    def free_slot(self, sequence: Sequence) -> None:
        self.sampler.remove(sequence.slot)
        heapq.heappush(self.free, sequence.slot)
        sequence.slot = -1
        client = sequence.request.client
        self.slots_of[client] -= 1
        if not self.slots_of[client]:
            del self.slots_of[client]

    # ------------------------------------------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Lets waiting requests in, reads some of their prompts and writes one token of each that can; its tokens."""
        self.admit()
        rows = sorted(self.writing, key=lambda sequence: sequence.slot)  # neighbours lie side by side in memory
        logits = []
        if rows:
            logits.append(self.runner.decode([row.slot for row in rows], [row.output[-1] for row in rows]))  # (B, V)
            self.counts.decode_tokens += len(rows)
        for sequence, after in self.read_prompts():
            rows.append(sequence)
            logits.append(after[None])  # (1, V)
        if not rows:
            return []
        self.longest_position = max(self.longest_position, *(row.position for row in rows))
        sampled, errors = self.choose(rows, logits[0] if len(logits) == 1 else torch.cat(logits))
        events = []
        for i, row in enumerate(rows):
            error = errors.get(row.slot)
            events.append(self.advance(row, i, sampled) if error is None else self.fail(row, error))
        return events

    def admit(self) -> None:
        """Gives slots to those whose turn it is; who can use what another reads, waits for that."""
        while self.waiting:
            sequence = self.waiting.next(self.slots_of, self.is_ready)
            if sequence is None or not (self.free or self.preempt_for(sequence)):
                return
            self.waiting.take(sequence)
            sequence.slot = heapq.heappop(self.free)
            self.slots_of[sequence.request.client] += 1
            request, group = sequence.request, self.groups[sequence.request.id]
            self.sampler.add(sequence.slot, request.params, request.prompt, sequence.seed, sequence.output)
            if sequence.saved is not None:
                self.runner.write_state(sequence.slot, sequence.saved)
                sequence.saved = None
            elif group.after_prompt is None:
                group.reader = sequence
                self.begin(sequence)
            (self.writing if sequence.prompt_is_read else self.reading).append(sequence)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether a continuation could use a slot now: not while another one reads its prompt."""
        group = self.groups[sequence.request.id]
        return sequence.saved is not None or group.reader is None or group.after_prompt is not None

    def preempt_for(self, waiting: Sequence) -> bool:
        """Frees a slot of a client that has more than its share, if there is one; the continuation in it goes on later.

        Not more states are put aside than there are slots.
        """
        unfair, client = client_to_preempt(waiting, self.slots_of)
        if not unfair or self.waiting.preempted >= self.runner.n_slots:
            return False
        begun = [sequence for sequence in self.reading if sequence.read > 0]  # others hold nothing, and get a turn soon
        theirs = [sequence for sequence in (*begun, *self.writing) if sequence.request.client == client]
        if not theirs:
            return False
        victim = theirs[-1]  # the last that got its slot
        self.counts.preempted += 1
        victim.saved = self.runner.read_state(victim.slot).to("cpu", torch.float32)
        (self.writing if victim.prompt_is_read else self.reading).remove(victim)
        self.free_slot(victim)
        self.waiting.put_back(victim)
        return True

    def begin(self, sequence: Sequence) -> None:
        """Puts the state to start from into a branch's slot: the request's own, a kept beginning's, or none."""
        request = sequence.request
        if request.state is not None:
            self.runner.write_state(sequence.slot, request.state)
            return
        # Of tokens that a kept state has read there are no logits.
        scored = request.prompt_logprobs is not None
        hit = None if scored else self.prefixes.find(request.prompt, request.prefix_owner)
        if hit is None:
            self.runner.clear(sequence.slot)
        else:
            self.runner.write_state(sequence.slot, hit.state)
            sequence.read = sequence.cached = hit.length
            self.counts.prefix_hits += 1
            self.counts.prefix_tokens_saved += hit.length
        sequence.keep_at = self.prefixes.worth_keeping(
            request.prompt, self.runner.state_nbytes, self.runner.prefill_alignment, request.prefix_owner
        )

    def read_prompts(self) -> list[tuple[Sequence, Tensor]]:
        """Reads chunks of prompts, in turn, until they come to `prefill_chunk` tokens; which prompts are now read, with
        the logits (V,) after them."""
        done = []
        left = self.prefill_chunk
        while self.reading and left > 0:
            sequence = self.reading[0]  # it stays there meanwhile: others look at the figures
            group = self.groups[sequence.request.id]
            if sequence is not group.reader and group.after_prompt is not None:
                state, logits = group.after_prompt
                self.runner.write_state(sequence.slot, state)
                sequence.read = len(sequence.request.prompt)
            else:
                logits, count = self.read_chunk(sequence)
                left -= count
            self.reading.popleft()
            if not sequence.prompt_is_read:
                self.reading.append(sequence)
                continue
            self.share(group, sequence, logits)
            done.append((sequence, logits))
            self.writing.append(sequence)
        return done

    def read_chunk(self, sequence: Sequence) -> tuple[Tensor, int]:
        """Reads the next tokens of a branch's prompt; the logits (V,) after them, and how many they were."""
        tokens = sequence.unread(self.prefill_chunk)
        if sequence.request.prompt_logprobs is None:
            logits = self.runner.prefill(sequence.slot, tokens)  # (V,)
        else:
            logits = self.score_chunk(sequence, tokens)  # (V,)
        sequence.read += len(tokens)
        self.counts.prefill_tokens += len(tokens)
        if sequence.read == sequence.keep_at:
            begun, state = sequence.request.prompt[: sequence.read], self.runner.read_state(sequence.slot)
            self.prefixes.keep(begun, state, sequence.request.prefix_owner)
        return logits, len(tokens)

    def score_chunk(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        """Reads tokens and scores those of the prompt that follow each; the logits (V,) after the last."""
        prompt, first, top = sequence.request.prompt, sequence.read + 1, sequence.request.prompt_logprobs or 0
        for logits in self.runner.prefill_logits(sequence.slot, tokens):  # (T, V)
            followers = list(prompt[first : first + len(logits)])  # T, or T - 1 at the prompt's end
            sequence.scores.append(score_tokens(logits[: len(followers)], followers, top))
            first += len(logits)
        return logits[-1]

    def share(self, group: SequenceGroup, sequence: Sequence, logits: Tensor) -> None:
        """Keeps the state after a prompt as long as others of its group wait for a slot or for this state."""
        behind = [other for other in group.sequences if not other.prompt_is_read]
        if not behind:
            group.after_prompt = None
        elif group.after_prompt is None:
            group.after_prompt = (self.runner.read_state(sequence.slot), logits.clone())

    def choose(self, rows: list[Sequence], logits: Tensor) -> tuple[Sampled, dict[int, BDHError]]:
        """Samples one token a row from logits (B, V); and what keeps constrained rows from going on, by slot, whose
        tokens then mean nothing."""
        allowed, errors = {}, {}
        for row in rows:
            if row.constraint is not None:
                try:
                    allowed[row.slot] = row.constraint.allowed()
                except BDHError as error:
                    errors[row.slot] = error
        forbidden = {row.slot: tokens for row in rows if (tokens := row.forbidden())}
        slots = [row.slot for row in rows]
        return self.sampler.sample(logits, slots, allowed or None, forbidden or None), errors

    def advance(self, sequence: Sequence, row: int, sampled: Sampled) -> Event:
        """Takes a branch's new token; if it is the last, the slot is free again."""
        request, token = sequence.request, sampled.tokens[row]
        sequence.output.append(token)
        try:
            if sequence.constraint is not None:
                sequence.constraint.accept(token)
            finish_reason = self.finish_reason(sequence)
        except BDHError as error:  # the grammar has come to the library's limits
            return self.fail(sequence, error)
        return Event(
            request.id,
            sequence.index,
            token,
            sampled.logprobs[row] if sampled.logprobs and sequence.wants_logprob else None,
            sampled.top[row] if sampled.top and request.params.logprobs else None,
            finish_reason,
            None if finish_reason is None else self.end(sequence),
            sequence.cached if len(sequence.output) == 1 else 0,
            prompt_logprobs=PromptLogprobs.join(sequence.scores)
            if sequence.scores and len(sequence.output) == 1
            else None,
        )

    def fail(self, sequence: Sequence, error: BDHError) -> Event:
        """Takes out a continuation that cannot go on; the others are none the worse for it."""
        self.leave(sequence)
        return Event(sequence.request.id, sequence.index, -1, error=error)

    def end(self, sequence: Sequence) -> BDHState | None:
        """Lets a continuation end at the last token reported; the state it leaves, if that is to be kept."""
        request, state = sequence.request, None
        keep_prefix = request.keep_prefix and request.state is None and self.prefixes.fits(self.runner.state_nbytes)
        if request.keep_state or keep_prefix:
            state = self.runner.read_state(sequence.slot) if sequence.saved is None else sequence.saved
        if keep_prefix and state is not None:
            self.prefixes.keep([*request.prompt, *sequence.output[:-1]], state, request.prefix_owner)
        self.counts.finished += 1
        self.leave(sequence)
        return state if request.keep_state else None

    def written(self, request_id: str, index: int) -> int:
        """How many tokens of a continuation were reported; 0 if it is over."""
        sequence = self.sequence(request_id, index)
        return 0 if sequence is None else len(sequence.output)

    def sequence(self, request_id: str, index: int) -> Sequence | None:
        group = self.groups.get(request_id)
        return next((sequence for sequence in group.sequences if sequence.index == index), None) if group else None

    def finish(self, request_id: str, index: int) -> BDHState | None:
        """Ends a continuation at the last token reported, as an end token would: when the caller has what it wants.

        Returns:
            With `keep_state`, the state after the prompt and all tokens but the last one reported; None for a
            continuation that is over, or of which no token was reported yet.
        """
        sequence = self.sequence(request_id, index)
        if sequence is None or not sequence.output:
            self.cancel(request_id, index)
            return None
        return self.end(sequence)

    def finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.output[-1] in sequence.request.ends or (
            sequence.constraint is not None and sequence.constraint.is_complete
        ):
            return "stop"
        return "length" if len(sequence.output) >= sequence.request.params.max_new_tokens else None
