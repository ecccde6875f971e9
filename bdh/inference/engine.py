"""The engine: continuous batching of requests, from token ids to token ids.

Differences from engines for transformers:

* There is no paged cache. A sequence's past is one state of constant size, so a sequence needs only a *slot*, in which
  it can run forever. Scheduling decides which sequence gets the next free slot.
* Slots are shared evenly among clients, not among requests: a client with more than its share gives up a slot to a
  waiting one. The preempted sequence resumes later from its saved state.
* Requests join and leave between steps. A step reads `prefill_chunk` tokens of prompts, round robin, and decodes one
  token of every sequence whose prompt is read, so a long prompt delays the others by one chunk.
* States are exact. All `n` continuations start from a copy of the state after the prompt, and the state after a common
  prefix of prompts is cached and copied.
* The tokens of a request depend on its prompt, settings and seed only, never on the rest of the batch: rows do not
  interact in the model, and each has its own random numbers.
"""

import heapq
import random
from collections import Counter, deque
from dataclasses import replace

import torch
from torch import Tensor

from bdh.errors import BDHError, QueueFull
from bdh.inference.constraint import Constraint, Grammars
from bdh.inference.prefix_cache import PrefixCache
from bdh.inference.request import Event, FinishReason, PromptLogprobs, Request
from bdh.inference.runner import Runner
from bdh.inference.sampling import Sampled, Sampler
from bdh.inference.scheduling import Sequence, SequenceGroup, WaitingQueue, client_to_preempt
from bdh.inference.scoring import score_tokens
from bdh.inference.stats import EngineStats, queue_has_room
from bdh.model import BDHState


class Engine:
    """Runs requests on the slots of a runner. Call `step` while it is `busy`. Not thread-safe.

    Args:
        runner: The model and its slots.
        grammars: Compiler of regular expressions and schemas; without it, constrained requests are refused.
        queue_size: Continuations that may wait for a slot; more are refused.
        prefill_chunk: Prompt tokens read in one step, at times up to twice as many; a multiple of the runner's
            `prefill_alignment`. None: the runner's own chunk.
        prefix_cache_bytes: Size limit of the prefix cache; 0 disables it.
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
        self.reading: deque[Sequence] = deque()  # sequences whose prompt is being read
        self.writing: list[Sequence] = []  # sequences that are being decoded
        self.free = list(range(runner.n_slots))  # a heap
        self.slots_of: Counter[str | None] = Counter()  # number of slots of each client that has any
        self.counts = EngineStats()
        self.longest_position = 0  # length of the longest sequence so far

    @property
    def busy(self) -> bool:
        return bool(self.groups)

    @property
    def stats(self) -> EngineStats:
        """Counters and present load."""
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
        """Release unused memory to the system, except for the prefix cache."""
        if not self.busy:
            self.runner.release()

    # ---------------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> str:
        """Queue a request; return its id.

        Raises:
            QueueFull: The queue is full.
            BDHError: The prompt is empty or has unknown tokens, or the params do not fit the model.
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
        """End a request, or one of its continuations, at once. Its slots become free; no events follow."""
        group = self.groups.get(request_id)
        for sequence in list(group.sequences) if group else []:
            if index is None or sequence.index == index:
                self.counts.cancelled += 1
                self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Remove a sequence from its queue and its group, and free its slot."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            (self.writing if sequence.prompt_is_read else self.reading).remove(sequence)
            self.free_slot(sequence)
        group = self.groups[sequence.request.id]
        group.sequences.remove(sequence)
        if group.reader is sequence:  # another sequence of the group reads the prompt
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
        """Admit waiting sequences, read chunks of prompts, and decode one token of each running sequence."""
        self.admit()
        rows = sorted(self.writing, key=lambda sequence: sequence.slot)  # in the order of the slots in memory
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
        """Assign free slots to waiting sequences. One sequence of a group reads the prompt for the others."""
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
        """Return whether a sequence could use a slot now: not while another one reads its prompt."""
        group = self.groups[sequence.request.id]
        return sequence.saved is not None or group.reader is None or group.after_prompt is not None

    def preempt_for(self, waiting: Sequence) -> bool:
        """Preempt a sequence of a client with more than its share, if there is one; return whether a slot was freed.

        At most as many states are saved as there are slots.
        """
        unfair, client = client_to_preempt(waiting, self.slots_of)
        if not unfair or self.waiting.preempted >= self.runner.n_slots:
            return False
        begun = [
            sequence for sequence in self.reading if sequence.read > 0
        ]  # without progress, there is nothing to preempt
        theirs = [sequence for sequence in (*begun, *self.writing) if sequence.request.client == client]
        if not theirs:
            return False
        victim = theirs[-1]  # the last one that got its slot
        self.counts.preempted += 1
        victim.saved = self.runner.read_state(victim.slot).to("cpu", torch.float32)
        (self.writing if victim.prompt_is_read else self.reading).remove(victim)
        self.free_slot(victim)
        self.waiting.put_back(victim)
        return True

    def begin(self, sequence: Sequence) -> None:
        """Initialize the slot of a sequence: with the state of the request, from the prefix cache, or empty."""
        request = sequence.request
        if request.state is not None:
            self.runner.write_state(sequence.slot, request.state)
            return
        # Cached tokens have no logits to score.
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
        """Read chunks of prompts, round robin, up to `prefill_chunk` tokens.

        Returns:
            The sequences whose prompts are complete now, with the logits (V,) after them.
        """
        done = []
        left = self.prefill_chunk
        while self.reading and left > 0:
            sequence = self.reading[0]  # stays in the queue meanwhile, for the statistics
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
        """Read the next chunk of a prompt; return the logits (V,) after it and its length."""
        tokens = sequence.unread(self.prefill_chunk)
        if sequence.request.prompt_logprobs is None:
            logits = self.runner.prefill(sequence.slot, tokens)  # (V,)
        else:
            logits = self.score_chunk(sequence, tokens)  # (V,)
        sequence.read += len(tokens)
        self.counts.prefill_tokens += len(tokens)
        if sequence.read == sequence.keep_at:
            prefix, state = sequence.request.prompt[: sequence.read], self.runner.read_state(sequence.slot)
            self.prefixes.keep(prefix, state, sequence.request.prefix_owner)
        return logits, len(tokens)

    def score_chunk(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        """Read prompt tokens and score the token after each; return the logits (V,) after the last."""
        prompt, first, top = sequence.request.prompt, sequence.read + 1, sequence.request.prompt_logprobs or 0
        for logits in self.runner.prefill_logits(sequence.slot, tokens):  # (T, V)
            targets = list(prompt[first : first + len(logits)])  # T, or T - 1 at the prompt's end
            sequence.scores.append(score_tokens(logits[: len(targets)], targets, top))
            first += len(logits)
        return logits[-1]

    def share(self, group: SequenceGroup, sequence: Sequence, logits: Tensor) -> None:
        """Save the state after a prompt while other sequences of the group need it."""
        behind = [other for other in group.sequences if not other.prompt_is_read]
        if not behind:
            group.after_prompt = None
        elif group.after_prompt is None:
            group.after_prompt = (self.runner.read_state(sequence.slot), logits.clone())

    def choose(self, rows: list[Sequence], logits: Tensor) -> tuple[Sampled, dict[int, BDHError]]:
        """Sample one token per row from logits (B, V).

        Returns:
            The tokens, and by slot the errors of constrained rows that cannot be continued; their tokens are invalid.
        """
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
        """Append a sampled token to a sequence; end the sequence if it is the last one."""
        request, token = sequence.request, sampled.tokens[row]
        sequence.output.append(token)
        try:
            if sequence.constraint is not None:
                sequence.constraint.accept(token)
            finish_reason = self.finish_reason(sequence)
        except BDHError as error:  # the grammar exceeds the limits of the library
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
        """End a sequence with an error."""
        self.leave(sequence)
        return Event(sequence.request.id, sequence.index, -1, error=error)

    def end(self, sequence: Sequence) -> BDHState | None:
        """End a sequence at its last token; return its state if the request keeps it."""
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
        """Return the number of tokens reported of a continuation; 0 if it has ended."""
        sequence = self.sequence(request_id, index)
        return 0 if sequence is None else len(sequence.output)

    def sequence(self, request_id: str, index: int) -> Sequence | None:
        group = self.groups.get(request_id)
        return next((sequence for sequence in group.sequences if sequence.index == index), None) if group else None

    def finish(self, request_id: str, index: int) -> BDHState | None:
        """End a continuation at its last reported token, as an end token would.

        Returns:
            With `keep_state`, the state after the prompt and all reported tokens but the last; None if the continuation
            has ended already or has no token yet.
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
