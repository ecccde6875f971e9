"""The training loop: read it from `train` down.

Everything it does is decided by the TrainConfig and the checkpoint it starts from; on the CPU the same two give the
same bits. Random numbers are drawn by dropout alone: data and samples have generators of their own.
"""

import platform
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bdh import __version__
from bdh.data.blocks import ValidationWindows, document_ids, inputs_and_targets
from bdh.data.loader import Batch, open_data
from bdh.data.tokenizer import vocabulary_size
from bdh.errors import BDHError, one_line
from bdh.inference.llm import sample_answers, sample_texts
from bdh.inference.params import SamplingParams
from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHConfig, BDHForCausalLM, state_of
from bdh.model.card import parameter_count
from bdh.model.device import choose_device
from bdh.training import checkpoint
from bdh.training.activity import observe_activity
from bdh.training.config import TrainConfig, compare, validate, with_vocabulary, with_whole_path
from bdh.training.device import autocast, hardware, recompute_layers, seed_everything
from bdh.training.evaluation import Evaluation, evaluate
from bdh.training.export import export_checkpoint
from bdh.training.folder import RunFolder
from bdh.training.init_from import check_start, load_start
from bdh.training.lora import add_adapters, check_peft, load_base
from bdh.training.meter import Meter
from bdh.training.norms import parameter_figures, weight_histograms
from bdh.training.optimizer import build_optimizer, learning_rate_at
from bdh.training.processes import Processes
from bdh.training.resume import by_process, choose_tokenizer, other_place, places_of, restore_random
from bdh.training.saver import Saver
from bdh.training.signals import caught_signals
from bdh.training.spread import Spread, local
from bdh.training.state import CarriedState, Outcome, RunState
from bdh.training.trackers import check_trackers, open_trackers, want_histograms
from bdh.training.tracking import Tracker, draw_curves


def train(config: TrainConfig, resume: Path | None = None) -> Outcome:
    """Trains to the end of the configuration, or until SIGINT or SIGTERM.

    Args:
        config: All settings; changed only in that `model.vocab_size` is filled in.
        resume: A checkpoint to go on from, None to begin.

    Raises:
        BDHError: The configuration cannot run, the run's folder is taken, the loss is not finite, or the last
            checkpoint cannot be written.
    """
    validate(config)
    check_trackers(config.logging)
    with Processes.open(config.distributed, config.training.device) as processes:
        try:
            return Trainer(config, resume, processes).run()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise BDHError(
                "there is not enough memory; try a smaller training.micro_batch_size, data.block_size or model, or "
                "training.gradient_checkpointing true"
            ) from error


class Trainer:
    """One run, as one of its processes has it: the parts, put together by `__init__`, and the loop over them."""

    def __init__(self, config: TrainConfig, resume: Path | None, processes: Processes | None = None):
        settings = config.training
        processes = processes or Processes(config.distributed, choose_device(settings.device))
        self.processes = processes
        self.device = processes.device
        saved = None if resume is None else checkpoint.read_state(resume)
        self.tokenizer = choose_tokenizer(config, resume)
        config = with_vocabulary(config, vocabulary_size(self.tokenizer))
        self.run_dir = Path(config.run_dir)
        self.store = checkpoint.CheckpointStore(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.folder = RunFolder(self.run_dir, self.store, resume)
        processes.on_main(self.folder.check)
        self.resumed_from = resume
        self.config = config
        self.notices = [] if saved is None else compare(saved["config"], with_whole_path(config))
        if config.init_from is not None and saved is None:
            self.notices += check_start(config, self.tokenizer)
        if config.lora.rank:
            check_peft()

        self.data = processes.one_after_the_other(
            lambda: open_data(
                config.data,
                self.tokenizer,
                settings.batch_size,
                settings.seed,
                settings.carry_state,
                processes.share,
                self.announce,
            )
        )
        self.notices += self.data.remarks
        self.apart = settings.carry_state or not config.data.cross_documents
        self.config = with_whole_path(config)
        self.windows = ValidationWindows(self.data.validation, config.data.block_size, settings.eval_windows)
        seed_everything(settings.seed)
        self.architecture = BDHConfig(**config.model.architecture())  # of the whole, however it is spread
        model = BDHForCausalLM(self.architecture)
        self.base = self.begin_with(model, saved)
        seed_everything(settings.seed + processes.rank)  # each drops other neurons
        in_bfloat16 = isinstance(self.precision(), torch.autocast)
        self.spread = Spread(model, processes, in_bfloat16, torch.compile if settings.compile else None)
        self.model = self.spread.model
        use_kernels(self.model.model.layer, config.model.kernels, self.device)
        if settings.gradient_checkpointing:
            recompute_layers(self.model)
        self.optimizer = build_optimizer(self.model, settings)
        size = self.piece_size()
        self.memory = (
            CarriedState.empty(self.model.config, size, self.data.batch_size // size, self.device)
            if settings.carry_state
            else None
        )
        self.meter = Meter(config, self.architecture, self.device, in_bfloat16)
        if settings.compile:
            self.try_compiled()

        processes.on_main(lambda: self.folder.claim(self.config))
        self.state = RunState()
        self.saver = Saver(self.store, self.tokenizer, processes)
        if resume is not None:
            self.restore(resume)
        self.timed_from = (self.state.step, self.state.seconds)
        self.tracker = Tracker(self.run_dir, settings.max_steps, self.state.step, processes.is_main)

    # ------------------------------------------------------------------------------------------------ setting up

    def announce(self, line: str) -> None:
        """Says what is being prepared, before there is anything to log."""
        with suppress(OSError):  # what is said here is no reason to stop
            if self.processes.is_main:
                print(line, flush=True)

    def begin_with(self, model: BDHForCausalLM, saved: dict[str, Any] | None) -> str | None:
        """Fills the model that a run begins with, if there is one, and adds adapters; returns the base's fingerprint.

        A run that goes on has all weights in its checkpoint, but with adapters, which are all that is saved there.
        """
        start, lora = self.config.init_from, self.config.lora
        if start is None or (saved is not None and not lora.rank):
            return None
        if not lora.rank:
            load_start(model, Path(start))
            return None
        base = load_base(model, Path(start), None if saved is None else saved["base"])
        add_adapters(model, lora)
        return base

    def try_compiled(self) -> None:
        """Tries the compiled model on a step of the real shape. Raises BDHError where that fails."""
        size, length = self.piece_size(), self.config.data.block_size + 1
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                tokens = torch.zeros(size, length, dtype=torch.int64)
                self.accumulate(Batch(tokens, torch.ones(size, dtype=torch.bool)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            words = "training.compile is true, but torch.compile does not work here"
            raise BDHError(f"{words}: {one_line(error)}") from error
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.clock.read(1)  # this was none of the run's steps

    def restore(self, path: Path) -> None:
        """Takes everything up as the checkpoint left it, and notes what is not as it was."""
        before = checkpoint.read_state(path)
        different = other_place(before, self.config, self.data.identity)
        places = places_of(before)
        if different is None and len(places) > 1 and len(places) != self.processes.share.world:
            different = f"the stream of text was read by {len(places)} processes"
        carried = None if self.memory is None or different else self.memory.tensors(self.processes.mesh)
        saved = checkpoint.load(path, self.model, self.optimizer, carried, self.spread.names)
        restore_random(saved, self.processes)
        if different is None:
            self.data.source.load_state_dict(places[self.processes.share.rank % len(places)])
        else:
            self.notices.append(f"{different}; the text is read from its beginning")
        if self.memory is not None and carried is not None:
            self.memory.load(carried)
        state = self.state = RunState(**{name: saved[name] for name in RunState.__dataclass_fields__ if name in saved})
        if saved["evaluation"] is not None:
            state.evaluation = Evaluation(**saved["evaluation"])
        if saved["hardware"] != self.hardware():
            self.notices.append(f"the run began on {saved['hardware']}: results agree within rounding, not bit for bit")
        if not self.folder.goes_on_here:  # a new run, which has no best checkpoint of its own yet
            state.best_checkpoint = state.best_validation_loss = None
            return
        state.saved_at = state.step
        for moved in self.processes.on_main(lambda: self.store.set_aside_after(state.step)):
            self.notices.append(f"the later checkpoint is now {moved}")
        best = state.best_checkpoint
        lost = best is not None and checkpoint.damage(self.store.directory / best) is not None
        if lost or saved["text"] != self.data.identity:
            known = state.evaluation if state.evaluated_at == state.step else None
            state.best_checkpoint, state.best_validation_loss = (path.name, known.loss) if known else (None, None)
        self.processes.on_main(lambda: self.store.link(path.name, state.best_checkpoint))

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        settings, state, said = self.config.training, self.state, self.tracker.say
        sequences = f"{settings.batch_size} x {self.config.data.block_size} tokens a step"
        parameters = parameter_count(self.architecture)
        precision = "bfloat16" if isinstance(self.precision(), torch.autocast) else "float32"
        text = "a stream of text" if self.data.train_tokens is None else f"{self.data.train_tokens:,} tokens of text"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        share = f", {trained:,} of them trained" if self.config.lora.rank else ""
        said(f"{parameters:,} parameters{share}, {text}, {sequences}")
        said(f"on {self.hardware()} in {precision}, into {self.run_dir}")
        for notice in self.notices:
            said(f"notice: {notice}")
        if self.processes.is_main:
            self.tracker.others = open_trackers(self.config, self.run_dir, state.step, self.tracker.last_step, said)
        if state.step:
            done = "; training.max_steps is reached" if state.step >= settings.max_steps else ""
            said(f"going on from step {state.step} of {settings.max_steps}{done}")
        try:
            with self.tracker, caught_signals() as caught:
                self.model.train()
                asked = 0
                while state.step < settings.max_steps and not asked:
                    self.step()
                    asked = self.processes.any(caught[0] if caught else 0)
                if asked and state.step < settings.max_steps:
                    self.processes.notice()
                    return self.interrupted(signal.Signals(asked))
                self.finish()
        finally:
            self.saver.close()
            self.data.close()
            self.folder.release()
        return Outcome(self.run_dir, state.step, None, state.evaluation, state.seconds)

    def step(self) -> None:
        """One optimizer step and whatever is due after it."""
        state, settings, logging = self.state, self.config.training, self.config.logging
        started = time.perf_counter()
        learning_rate = learning_rate_at(state.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.meter.clock("data"):
            batch = self.data.next_batch()
        predicted = self.predicted(batch)
        loss = self.accumulate(batch, predicted)
        by_parameter: dict[str, float] = {}
        if self.due(logging.parameter_interval, state.step + 1):
            by_parameter = self.spread.together(parameter_figures(self.model))
        norm = self.spread.clip(settings.gradient_clip or float("inf"))
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise self.not_finite(f"step {state.step + 1}: the loss is {loss} and the gradient's norm {norm}")
        with self.meter.clock("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started

        state.step += 1
        state.tokens += settings.batch_size * self.config.data.block_size
        state.seconds += elapsed
        last = state.step == settings.max_steps
        if state.step % logging.interval == 0 or last or state.step == 1 or by_parameter:
            self.tracker.step(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "gradient_norm": norm,
                    **({"answer_tokens": predicted} if self.config.data.has_chats() else {}),
                    **self.speed(),
                    "seconds": state.seconds,
                    **by_parameter,
                }
            )
        sample_due = logging.sample_interval and (state.step % logging.sample_interval == 0 or last)
        save_due = state.step % self.config.checkpoint.interval == 0 and not last
        if state.step % settings.eval_interval == 0 or sample_due or save_due:
            self.evaluate()
        if sample_due:
            self.sample()
        if save_due:
            with self.meter.clock("checkpoint"):
                self.save()

    def due(self, interval: int, step: int) -> bool:
        """Whether something of this interval is due at a step; of an interval of 0 nothing ever is."""
        return interval > 0 and step % interval == 0

    def speed(self) -> dict[str, float]:
        """Figures of a step's work, averaged since this was last asked; evaluation and saving not counted as steps."""
        steps, seconds = self.state.step - self.timed_from[0], self.state.seconds - self.timed_from[1]
        self.timed_from = (self.state.step, self.state.seconds)
        tokens = self.config.training.batch_size * self.config.data.block_size
        rate = steps * tokens / seconds
        return {"tokens_per_second": rate, "seconds_per_step": seconds / steps, **self.meter.read(steps, rate)}

    def accumulate(self, batch: Batch, predicted: int | None = None) -> float:
        """Forward and backward over this process's rows of a batch (B, T + 1), in pieces.

        Leaves the gradient of the mean loss, and returns that. The mean is over the tokens to predict of all rows of
        all processes, `predicted`, however they fall into pieces: each piece gives its sum, divided by their number.
        Copies of a model take the mean of their gradients, so each counts as many times as there are copies.
        """
        predicted = self.predicted(batch) if predicted is None else predicted
        number_of_all = torch.tensor(max(predicted, 1), device=self.device)
        copies = self.processes.share.world
        total = torch.zeros((), dtype=torch.float64)
        size, end_of_text = self.piece_size(), self.tokenizer.eos_token_id
        pieces = batch.tokens.split(size)
        for number, part in enumerate(pieces):
            part = part.to(self.device, non_blocking=True)  # (b, T + 1)
            inputs, targets = inputs_and_targets(part)  # (b, T) each
            given: dict[str, Any] = {"use_cache": False, "num_items_in_batch": number_of_all}
            if self.apart:
                given["document_ids"] = document_ids(inputs, end_of_text)  # (b, T)
            if self.memory is not None:
                fresh = batch.fresh[number * size : (number + 1) * size].to(self.device)  # (b,)
                given |= {"use_cache": True, "past_key_values": self.memory.before(number, fresh)}
            with self.spread.piece(is_last=number == len(pieces) - 1):
                with self.meter.clock("forward"), self.precision():
                    outputs = self.spread.forward(inputs, labels=targets, shift_labels=targets, **given)
                if self.memory is not None:
                    state = state_of(outputs)
                    assert state is not None
                    self.memory.after(number, state)
                with self.meter.clock("backward"):
                    (outputs.loss * copies if copies > 1 else outputs.loss).backward()
            total += outputs.loss.item()
        return self.processes.sum(total).item()

    def predicted(self, batch: Batch) -> int:
        """How many tokens the rows of all processes have to predict."""
        if self.processes.alone or not self.config.data.has_chats():
            return batch.predicted * self.processes.share.world
        return round(self.processes.sum(torch.tensor(batch.predicted, dtype=torch.float64)).item())

    def piece_size(self) -> int:
        """Sequences of one forward pass of this process."""
        return self.config.training.micro_batch_size or self.data.batch_size

    def evaluate(self) -> None:
        """Validates, unless this step has been. A loss that is not finite ends the run: BDHError."""
        state, settings = self.state, self.config.training
        if state.evaluated_at == state.step:
            return
        started = time.perf_counter()
        with self.spread.whole_steps():
            state.evaluation = evaluate(
                self.model,
                self.windows,
                self.data.validation_bytes_per_token,
                settings.eval_batch_size,
                self.precision,
                end_of_text=self.tokenizer.eos_token_id if self.apart else None,
                carry_state=settings.carry_state,
                share=self.processes.share,
                together=self.processes.sum,
            )
        state.evaluated_at = state.step
        result = state.evaluation
        if not np.isfinite(result.loss):
            raise self.not_finite(f"step {state.step}: the validation loss is {result.loss}")
        self.tracker.evaluation(
            {
                "step": state.step,
                "tokens": state.tokens,
                "validation_loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "perplexity_per_byte": result.perplexity_per_byte,
                "accuracy": result.accuracy,
                **self.activity(),
                **({"validation_answer_tokens": result.tokens} if self.config.data.has_chats() else {}),
                "evaluation_seconds": time.perf_counter() - started,
            }
        )

    def activity(self) -> dict[str, float]:
        """How active the neurons are on a few windows of the validation text; trackers that can get histograms too."""
        windows = self.config.logging.activity_windows
        detailed = want_histograms(self.config.logging)
        histograms = weight_histograms(self.model) if detailed else {}
        figures: dict[str, float] = {}
        if windows:
            few = ValidationWindows(self.data.validation, self.config.data.block_size, windows)
            end_of_text = self.tokenizer.eos_token_id if self.apart else None
            figures, activity = observe_activity(self.model, few, self.precision, end_of_text, detailed)
            histograms |= activity
        if histograms:
            self.tracker.histograms(self.state.step, histograms)
        return self.spread.together(figures)

    def sample(self) -> None:
        """Lets the model write on from the fixed prompts, with a seed of their own."""
        logging = self.config.logging
        params = SamplingParams(
            max_new_tokens=logging.sample_tokens,
            temperature=logging.sample_temperature,
            seed=(self.config.training.seed + self.state.step) % 2**63,
        )
        chat = self.config.data.has_chats()
        write = sample_answers if chat else sample_texts
        with self.spread.whole_steps():  # all processes write the same
            texts = write(self.model, self.tokenizer, logging.sample_prompts, params)
        said = [prompt + "\n" * chat for prompt in logging.sample_prompts]
        self.tracker.samples(self.state.step, list(zip(said, texts, strict=True)))

    # ----------------------------------------------------------------------------------- checkpoints and endings

    def save(self, scheduled: bool = True) -> bool:
        """Begins to write a checkpoint, or, if it is not scheduled, writes it; False if the disk does not let it.

        One that is not scheduled, of a run that is interrupted, never counts as the best: it would not be there had
        the run not been interrupted.
        """
        state = self.state
        name = f"checkpoint-{state.step:07d}"
        best = (state.best_validation_loss, state.best_checkpoint)
        if scheduled and state.evaluated_at == state.step and state.evaluation is not None:
            loss = state.evaluation.loss
            if best[0] is None or loss < best[0]:
                state.best_validation_loss, state.best_checkpoint = loss, name
        last, before = state.step == self.config.training.max_steps, state.saved_at

        def failed(error: OSError) -> None:
            state.best_validation_loss, state.best_checkpoint = best
            state.saved_at = before
            self.tracker.say(
                f"warning: {self.store.directory / name} could not be written ({error.strerror or error}); the partial "
                + "files are removed"
                + (", and training goes on until the next checkpoint is due" if scheduled and not last else "")
            )

        self.saver.wait()
        state.saved_at = state.step
        carried = None if self.memory is None else self.memory.tensors(self.processes.mesh)
        tensors = checkpoint.collect(self.model, self.optimizer, carried, self.spread.names)
        self.saver.save(state.step, tensors, self.saved_state(), failed)
        return True if scheduled and not last else self.saver.wait()

    def saved_state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        progress = asdict(self.state)
        progress.pop("saved_at")
        everywhere = self.processes.gather((self.data.source.state_dict(), checkpoint.random_state()))
        return {
            **progress,
            "data": everywhere[0][0],
            "random": everywhere[0][1],
            **({} if self.processes.alone else by_process(everywhere, self.processes)),
            "text": self.data.identity,
            "config": asdict(self.config),
            "base": self.base,
            "hardware": self.hardware(),
            "versions": {
                "bdh": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def finish(self) -> None:
        """The end of a run: a last validation and checkpoint, the curves, and the export of the best checkpoint."""
        if self.state.saved_at != self.state.step:
            self.evaluate()
            if not self.save():
                raise BDHError(f"the last checkpoint could not be written; make room, then {self.way_on()}")
        elif not self.saver.wait():
            raise BDHError(f"the last checkpoint could not be written; make room, then {self.way_on()}")
        for line in self.data.source.remarks():
            self.tracker.say(f"notice: {line}")
        self.processes.on_main(self.publish)

    def publish(self) -> None:
        """Draws the curves, and makes the export. For the main process."""
        self.draw()
        best = checkpoint.find_checkpoint(self.run_dir, prefer="best", report=self.tracker.say)
        try:
            base = self.config.init_from
            export_checkpoint(best, self.run_dir / "model", None if base is None else Path(base))
        except BDHError as error:
            raise BDHError(
                f"{best} is saved, but {error}; make room, then: bdh export {best} {self.run_dir / 'model'}"
            ) from error
        which = ", the best by validation loss" if best.name == self.state.best_checkpoint else ""
        self.tracker.say(f"done: {self.run_dir / 'model'} is the export of {best.name}{which}")

    def interrupted(self, number: signal.Signals) -> Outcome:
        """Stopped by a signal: save, draw what there is, say how to go on."""
        state = self.state
        if not all(torch.isfinite(local(p)).all() for p in self.model.parameters()):
            raise self.not_finite(f"step {state.step}: weights are not finite")
        saved = self.saver.wait() if state.saved_at == state.step else self.save(scheduled=False)
        self.processes.on_main(self.draw)
        where = f"saved at step {state.step} of {self.config.training.max_steps}; " if saved else "not saved; "
        self.tracker.say(f"stopped by {number.name}, {where}{self.way_on()}")
        return Outcome(self.run_dir, state.step, number, state.evaluation, state.seconds)

    def way_on(self) -> str:
        """How to take this run up again."""
        if self.store.latest()[0] is None:
            return f"begin again (no checkpoint was written): bdh train --config {self.run_dir / 'config.yaml'}"
        return f"go on with: bdh train --resume {self.run_dir}"

    def draw(self) -> None:
        try:
            draw_curves(self.tracker.metrics_path, self.run_dir / "loss.png")
        except OSError as error:
            self.tracker.say(f"warning: {self.run_dir / 'loss.png'} could not be drawn ({error.strerror or error})")

    def not_finite(self, what: str) -> BDHError:
        """The error that stops a run whose numbers are no longer numbers."""
        self.saver.wait()
        good = self.store.latest()[0] or self.resumed_from
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        return BDHError(
            f"{what}, so training stops; {kept}; try a lower training.learning_rate, a longer training.warmup_steps, "
            "or training.precision float32"
        )

    def hardware(self) -> str:
        """What computes, in words."""
        count = self.processes.size
        return hardware(self.device) if count == 1 else f"{count} x {hardware(self.device)}"

    def precision(self) -> Any:
        return autocast(self.config.training, self.device)
