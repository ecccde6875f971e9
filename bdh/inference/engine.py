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
from bdh.inference.figures import EngineStats, queue_has_room
from bdh.inference.prefix import PrefixCache
from bdh.inference.request import Event, FinishReason, PromptLogprobs, Request
from bdh.inference.runner import Runner
from bdh.inference.sampling import Sampled, Sampler
from bdh.inference.scheduling import Branch, Group, WaitingQueue, client_to_preempt
from bdh.inference.scoring import score_tokens
from bdh.model import BDHState


class Engine:
    """Runs requests on a runner's slots; call `step` while it is `busy`. Not for several threads at once.

    Args:
        runner: The model and its slots.
        grammars: What compiles regular expressions and schemas; without it, constrained requests are refused.
        queue_size: Continuations that may wait for a slot; one more is refused.
        prefill_chunk: Tokens of prompts read in one step, less than twice as many at times; a multiple of the runner's
            grain. None: what the runner does best.
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
        self.groups: dict[str, Group] = {}
        self.waiting = WaitingQueue()
        self.reading: deque[Branch] = deque()  # have a slot, read their prompt
        self.writing: list[Branch] = []  # have a slot and a last token to go on from
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
        branches = [Branch(request, index, (seed + index) % 2**63, self.constraint(request)) for index in range(count)]
        self.groups[request.id] = Group(branches)
        self.waiting.extend(branches)
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
        for branch in list(group.branches) if group else []:
            if index is None or branch.index == index:
                self.counts.cancelled += 1
                self.leave(branch)

    def leave(self, branch: Branch) -> None:
        """Takes a continuation out of wherever it is."""
        if branch.slot < 0:
            self.waiting.remove(branch)
        else:
            (self.writing if branch.prompt_is_read else self.reading).remove(branch)
            self.free_slot(branch)
        group = self.groups[branch.request.id]
        group.branches.remove(branch)
        if group.reader is branch:  # the next of the group reads the prompt
            group.reader = None
        if all(other.prompt_is_read for other in group.branches):
            group.after_prompt = None
        if not group.branches:
            del self.groups[branch.request.id]

    def free_slot(self, branch: Branch) -> None:
        self.sampler.remove(branch.slot)
        heapq.heappush(self.free, branch.slot)
        branch.slot = -1
        client = branch.request.client
        self.slots_of[client] -= 1
        if not self.slots_of[client]:
            del self.slots_of[client]

    # ------------------------------------------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Lets waiting requests in, reads some of their prompts and writes one token of each that can; its tokens."""
        self.admit()
        rows = sorted(self.writing, key=lambda branch: branch.slot)  # neighbours lie side by side in memory
        logits = []
        if rows:
            logits.append(self.runner.decode([row.slot for row in rows], [row.output[-1] for row in rows]))  # (B, V)
            self.counts.decode_tokens += len(rows)
        for branch, after in self.read_prompts():
            rows.append(branch)
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
            branch = self.waiting.next(self.slots_of, self.is_ready)
            if branch is None or not (self.free or self.preempt_for(branch)):
                return
            self.waiting.take(branch)
            branch.slot = heapq.heappop(self.free)
            self.slots_of[branch.request.client] += 1
            request, group = branch.request, self.groups[branch.request.id]
            self.sampler.add(branch.slot, request.params, request.prompt, branch.seed, branch.output)
            if branch.saved is not None:
                self.runner.write_state(branch.slot, branch.saved)
                branch.saved = None
            elif group.after_prompt is None:
                group.reader = branch
                self.begin(branch)
            (self.writing if branch.prompt_is_read else self.reading).append(branch)

    def is_ready(self, branch: Branch) -> bool:
        """Whether a continuation could use a slot now: not while another one reads its prompt."""
        group = self.groups[branch.request.id]
        return branch.saved is not None or group.reader is None or group.after_prompt is not None

    def preempt_for(self, waiting: Branch) -> bool:
        """Frees a slot of a client that has more than its share, if there is one; the continuation in it goes on later.

        Not more states are put aside than there are slots.
        """
        unfair, client = client_to_preempt(waiting, self.slots_of)
        if not unfair or self.waiting.preempted >= self.runner.n_slots:
            return False
        begun = [branch for branch in self.reading if branch.read > 0]  # others hold nothing, and get a turn soon
        theirs = [branch for branch in (*begun, *self.writing) if branch.request.client == client]
        if not theirs:
            return False
        victim = theirs[-1]  # the last that got its slot
        self.counts.preempted += 1
        victim.saved = self.runner.read_state(victim.slot).to("cpu", torch.float32)
        (self.writing if victim.prompt_is_read else self.reading).remove(victim)
        self.free_slot(victim)
        self.waiting.put_back(victim)
        return True

    def begin(self, branch: Branch) -> None:
        """Puts the state to start from into a branch's slot: the request's own, a kept beginning's, or none."""
        request = branch.request
        if request.state is not None:
            self.runner.write_state(branch.slot, request.state)
            return
        # Of tokens that a kept state has read there are no logits.
        scored = request.prompt_logprobs is not None
        hit = None if scored else self.prefixes.find(request.prompt, request.prefix_owner)
        if hit is None:
            self.runner.clear(branch.slot)
        else:
            self.runner.write_state(branch.slot, hit.state)
            branch.read = branch.cached = hit.length
            self.counts.prefix_hits += 1
            self.counts.prefix_tokens_saved += hit.length
        branch.keep_at = self.prefixes.worth_keeping(
            request.prompt, self.runner.state_nbytes, self.runner.grain, request.prefix_owner
        )

    def read_prompts(self) -> list[tuple[Branch, Tensor]]:
        """Reads chunks of prompts, in turn, until they come to `prefill_chunk` tokens; which prompts are now read, with
        the logits (V,) after them."""
        done = []
        left = self.prefill_chunk
        while self.reading and left > 0:
            branch = self.reading[0]  # it stays there meanwhile: others look at the figures
            group = self.groups[branch.request.id]
            if branch is not group.reader and group.after_prompt is not None:
                state, logits = group.after_prompt
                self.runner.write_state(branch.slot, state)
                branch.read = len(branch.request.prompt)
            else:
                logits, count = self.read_chunk(branch)
                left -= count
            self.reading.popleft()
            if not branch.prompt_is_read:
                self.reading.append(branch)
                continue
            self.share(group, branch, logits)
            done.append((branch, logits))
            self.writing.append(branch)
        return done

    def read_chunk(self, branch: Branch) -> tuple[Tensor, int]:
        """Reads the next tokens of a branch's prompt; the logits (V,) after them, and how many they were."""
        tokens = branch.unread(self.prefill_chunk)
        if branch.request.prompt_logprobs is None:
            logits = self.runner.prefill(branch.slot, tokens)  # (V,)
        else:
            logits = self.score_chunk(branch, tokens)  # (V,)
        branch.read += len(tokens)
        self.counts.prefill_tokens += len(tokens)
        if branch.read == branch.keep_at:
            begun, state = branch.request.prompt[: branch.read], self.runner.read_state(branch.slot)
            self.prefixes.keep(begun, state, branch.request.prefix_owner)
        return logits, len(tokens)

    def score_chunk(self, branch: Branch, tokens: list[int]) -> Tensor:
        """Reads tokens and scores those of the prompt that follow each; the logits (V,) after the last."""
        prompt, first, top = branch.request.prompt, branch.read + 1, branch.request.prompt_logprobs or 0
        for logits in self.runner.prefill_logits(branch.slot, tokens):  # (T, V)
            followers = list(prompt[first : first + len(logits)])  # T, or T - 1 at the prompt's end
            branch.scores.append(score_tokens(logits[: len(followers)], followers, top))
            first += len(logits)
        return logits[-1]

    def share(self, group: Group, branch: Branch, logits: Tensor) -> None:
        """Keeps the state after a prompt as long as others of its group wait for a slot or for this state."""
        behind = [other for other in group.branches if not other.prompt_is_read]
        if not behind:
            group.after_prompt = None
        elif group.after_prompt is None:
            group.after_prompt = (self.runner.read_state(branch.slot), logits.clone())

    def choose(self, rows: list[Branch], logits: Tensor) -> tuple[Sampled, dict[int, BDHError]]:
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

    def advance(self, branch: Branch, row: int, sampled: Sampled) -> Event:
        """Takes a branch's new token; if it is the last, the slot is free again."""
        request, token = branch.request, sampled.tokens[row]
        branch.output.append(token)
        try:
            if branch.constraint is not None:
                branch.constraint.accept(token)
            finish_reason = self.finish_reason(branch)
        except BDHError as error:  # the grammar has come to the library's limits
            return self.fail(branch, error)
        return Event(
            request.id,
            branch.index,
            token,
            sampled.logprobs[row] if sampled.logprobs and branch.wants_logprob else None,
            sampled.top[row] if sampled.top and request.params.logprobs else None,
            finish_reason,
            None if finish_reason is None else self.end(branch),
            branch.cached if len(branch.output) == 1 else 0,
            prompt_logprobs=PromptLogprobs.join(branch.scores) if branch.scores and len(branch.output) == 1 else None,
        )

    def fail(self, branch: Branch, error: BDHError) -> Event:
        """Takes out a continuation that cannot go on; the others are none the worse for it."""
        self.leave(branch)
        return Event(branch.request.id, branch.index, -1, error=error)

    def end(self, branch: Branch) -> BDHState | None:
        """Lets a continuation end at the last token reported; the state it leaves, if that is to be kept."""
        request, state = branch.request, None
        keep_prefix = request.keep_prefix and request.state is None and self.prefixes.fits(self.runner.state_nbytes)
        if request.keep_state or keep_prefix:
            state = self.runner.read_state(branch.slot) if branch.saved is None else branch.saved
        if keep_prefix and state is not None:
            self.prefixes.keep([*request.prompt, *branch.output[:-1]], state, request.prefix_owner)
        self.counts.finished += 1
        self.leave(branch)
        return state if request.keep_state else None

    def written(self, request_id: str, index: int) -> int:
        """How many tokens of a continuation were reported; 0 if it is over."""
        branch = self.branch(request_id, index)
        return 0 if branch is None else len(branch.output)

    def branch(self, request_id: str, index: int) -> Branch | None:
        group = self.groups.get(request_id)
        return next((branch for branch in group.branches if branch.index == index), None) if group else None

    def finish(self, request_id: str, index: int) -> BDHState | None:
        """Ends a continuation at the last token reported, as an end token would: when the caller has what it wants.

        Returns:
            With `keep_state`, the state after the prompt and all tokens but the last one reported; None for a
            continuation that is over, or of which no token was reported yet.
        """
        branch = self.branch(request_id, index)
        if branch is None or not branch.output:
            self.cancel(request_id, index)
            return None
        return self.end(branch)

    def finish_reason(self, branch: Branch) -> FinishReason | None:
        if branch.output[-1] in branch.request.ends or (
            branch.constraint is not None and branch.constraint.is_complete
        ):
            return "stop"
        return "length" if len(branch.output) >= branch.request.params.max_new_tokens else None
