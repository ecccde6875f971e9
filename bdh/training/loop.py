"""The training loop: read it from `train` down.

Everything it does is decided by the TrainConfig and the checkpoint it starts from; on the CPU the same two give the
same bits. Random numbers are drawn by dropout alone: data and samples have generators of their own.
"""

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdh.data.loader import TrainingData, open_data
from bdh.data.tokenizer import vocabulary_size
from bdh.distributed.head_sharding import local_shard
from bdh.distributed.parallel import ParallelModel
from bdh.distributed.processes import Processes
from bdh.errors import BDHError
from bdh.evaluation.by_position import PositionBin
from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHForCausalLM
from bdh.model.device import choose_device
from bdh.model.model_card import parameter_count
from bdh.training import checkpoint
from bdh.training.background_saver import Saver
from bdh.training.checkpoint_contents import (
    choose_tokenizer,
    data_positions,
    position_mismatch,
    restore_random,
    state_to_save,
)
from bdh.training.config import TrainConfig, compare, validate, with_vocabulary, with_whole_path
from bdh.training.device_setup import autocast, hardware, recompute_layers, seed_everything
from bdh.training.evaluator import Evaluator
from bdh.training.export import checkpoint_config, export_run, model_config
from bdh.training.gradient_accumulator import GradientAccumulator
from bdh.training.init_from import check_start
from bdh.training.lora import begin_with, check_peft
from bdh.training.norms import parameter_figures
from bdh.training.optimizer import build_optimizer, learning_rate_at
from bdh.training.run_folder import RunFolder
from bdh.training.run_log import Tracker
from bdh.training.run_state import Outcome, RunState
from bdh.training.signals import caught_signals
from bdh.training.step_metrics import Meter
from bdh.training.trackers import check_trackers, open_trackers
from bdh.training.validation import Evaluation, beyond_block_figures


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
        saved = None
        if resume is not None:
            saved = checkpoint.read_state(resume)
            checkpoint_config(resume, saved)  # before memory is taken for it
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

        self.data = processes.main_process_first(lambda: self.open_text(config))
        self.notices += self.data.remarks
        config = self.config = with_whole_path(config)
        seed_everything(settings.seed)
        self.architecture = model_config(config)  # of the whole, however it is spread
        model = BDHForCausalLM(self.architecture)
        self.base = begin_with(model, config, saved)
        seed_everything(settings.seed + processes.rank)  # each drops other neurons
        in_bfloat16 = isinstance(self.precision(), torch.autocast)
        self.parallel_model = ParallelModel(model, processes, in_bfloat16, torch.compile if settings.compile else None)
        self.model = self.parallel_model.model
        use_kernels(self.model.model.layer, config.model.kernels, self.device)
        if settings.gradient_checkpointing:
            recompute_layers(self.model)
        self.optimizer = build_optimizer(self.model, settings)
        self.meter = Meter(config, self.architecture, self.device, in_bfloat16)
        apart = settings.carry_state or not config.data.cross_documents
        end_of_text = self.tokenizer.eos_token_id if apart else None
        self.accumulator = GradientAccumulator(
            config, self.parallel_model, processes, self.data.batch_size, end_of_text, self.precision, self.meter
        )
        self.evaluator = Evaluator(
            config, self.parallel_model, processes, self.data, self.tokenizer, end_of_text, self.precision
        )
        if settings.compile:
            self.accumulator.warmup_compile()
            self.optimizer.zero_grad(set_to_none=True)
            self.meter.clock.read(1)  # this was none of the run's steps

        processes.on_main(lambda: self.folder.claim(self.config))
        self.state = RunState()
        self.folder_change: str | None = None  # since it was claimed: "removed", or "renamed to …"
        self.saver = Saver(self.store, self.tokenizer, processes)
        if resume is not None:
            self.restore(resume)
        self.timed_from = (self.state.step, self.state.seconds)
        self.tracker = Tracker(self.run_dir, settings.max_steps, self.state.step, processes.is_main)

    # ------------------------------------------------------------------------------------------------ setting up

    def open_text(self, config: TrainConfig) -> TrainingData:
        """The text, of which this process has its share. Raises BDHError."""
        settings = config.training
        return open_data(
            config.data,
            self.tokenizer,
            settings.batch_size,
            settings.seed,
            settings.carry_state,
            self.processes.share,
            self.announce,
        )

    def announce(self, line: str) -> None:
        """Says what is being prepared, before there is anything to log."""
        with suppress(OSError):  # what is said here is no reason to stop
            if self.processes.is_main:
                print(line, flush=True)

    def restore(self, path: Path) -> None:
        """Takes everything up as the checkpoint left it, and notes what is not as it was."""
        before = checkpoint.read_state(path)
        different = position_mismatch(before, self.config, self.data.identity)
        with checkpoint.naming_damage(path):
            places = data_positions(before)
        if different is None and len(places) > 1 and len(places) != self.processes.share.world:
            different = f"the stream of text was read by {len(places)} processes"
        memory = self.accumulator.memory
        carried = None if memory is None or different else memory.tensors(self.processes.mesh)
        saved = checkpoint.load(path, self.model, self.optimizer, carried, self.parallel_model.names)
        with checkpoint.naming_damage(path):
            restore_random(saved, self.processes)
            if different is None:
                self.data.source.load_state_dict(places[self.processes.share.rank % len(places)])
        if different is not None:
            self.notices.append(f"{different}; the text is read from its beginning")
        if memory is not None and carried is not None:
            memory.load(carried)
        with checkpoint.naming_damage(path):
            state = RunState(**{name: saved[name] for name in RunState.__dataclass_fields__ if name in saved})
            if saved["evaluation"] is not None:
                state.evaluation = Evaluation(**saved["evaluation"])
            if saved.get("beyond_block") is not None:
                state.beyond_block = PositionBin(**saved["beyond_block"])
        self.state = state
        if saved["hardware"] != self.hardware():
            self.notices.append(f"the run began on {saved['hardware']}: results agree within rounding, not bit for bit")
        if self.folder.goes_on_here:
            self.keep_checkpoints(path, same_text=saved["text"] == self.data.identity)
        else:  # a new run, which has no best checkpoint of its own yet
            state.best_checkpoint = state.best_validation_loss = None

    def keep_checkpoints(self, path: Path, same_text: bool) -> None:
        """Makes the run's checkpoints those up to the one at `path`, and the best the best of these on this text."""
        state = self.state
        state.saved_at = state.step
        for moved in self.processes.on_main(lambda: self.store.set_aside_after(state.step)):
            self.notices.append(f"the later checkpoint is now {moved}")
        best, lost = state.best_checkpoint, False
        if best not in (None, path.name):  # that one is whole, or nobody would go on from it
            lost = self.processes.on_main(lambda: checkpoint.damage(self.store.directory / str(best)) is not None)
        if lost or not same_text:
            known = state.evaluation if state.evaluated_at == state.step else None
            state.best_checkpoint, state.best_validation_loss = (path.name, known.loss) if known else (None, None)
        self.processes.on_main(lambda: self.store.link(path.name, state.best_checkpoint))

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Trains until the last step, or until all processes are asked to stop. Raises BDHError."""
        settings, state = self.config.training, self.state
        self.introduce()
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

    def introduce(self) -> None:
        """Says what is trained, on what and where, and opens the trackers."""
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

    def step(self) -> None:
        """One optimizer step and whatever is due after it."""
        state, settings, logging = self.state, self.config.training, self.config.logging
        started = time.perf_counter()
        figures, by_parameter = self.learn()
        state.step += 1
        state.tokens += settings.batch_size * self.config.data.block_size
        state.seconds += time.perf_counter() - started
        last = state.step == settings.max_steps
        log_due = state.step % logging.interval == 0 or last or state.step == 1 or bool(by_parameter)
        save_due = state.step % self.config.checkpoint.interval == 0 and not last
        if log_due:
            self.follow_folder()
            progress = {"step": state.step, "tokens": state.tokens}
            self.tracker.step({**progress, **figures, **self.speed(), "seconds": state.seconds, **by_parameter})
        sample_due = logging.sample_interval and (state.step % logging.sample_interval == 0 or last)
        if state.step % settings.eval_interval == 0 or sample_due or save_due:
            self.evaluate()
        if sample_due:
            samples = self.evaluator.samples(state.step)
            self.follow_folder()
            self.tracker.samples(state.step, samples)
        if save_due:
            with self.meter.clock("checkpoint"):
                self.save()
        if self.folder_change is not None:
            raise self.folder_changed()

    def learn(self) -> tuple[dict[str, float], dict[str, float]]:
        """Takes the gradient of the next batch and follows it; figures of that, and those by parameter if they are due.

        Raises BDHError where the loss or the gradient is not finite; weights and optimizer are then as they were.
        """
        state, settings, interval = self.state, self.config.training, self.config.logging.parameter_interval
        learning_rate = learning_rate_at(state.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.meter.clock("data"):
            batch = self.data.next_batch()
        num_target_tokens = self.accumulator.num_target_tokens(batch)
        loss = self.accumulator.accumulate(batch, num_target_tokens)
        by_parameter: dict[str, float] = {}
        if interval and (state.step + 1) % interval == 0:
            by_parameter = self.parallel_model.gather_metrics(parameter_figures(self.model))
        norm = self.parallel_model.clip(settings.gradient_clip or float("inf"))
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise self.not_finite(f"step {state.step + 1}: the loss is {loss} and the gradient's norm {norm}")
        with self.meter.clock("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        figures = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}
        if self.config.data.has_chats():
            figures["answer_tokens"] = num_target_tokens
        if not num_target_tokens:  # a mean over no tokens
            del figures["loss"]
        return figures, by_parameter

    def speed(self) -> dict[str, float]:
        """Figures of a step's work, averaged since this was last asked; evaluation and saving not counted as steps."""
        steps, seconds = self.state.step - self.timed_from[0], self.state.seconds - self.timed_from[1]
        self.timed_from = (self.state.step, self.state.seconds)
        tokens = self.config.training.batch_size * self.config.data.block_size
        rate = steps * tokens / seconds
        return {"tokens_per_second": rate, "seconds_per_step": seconds / steps, **self.meter.read(steps, rate)}

    def evaluate(self) -> None:
        """Validates, unless this step has been. A loss that is not finite ends the run: BDHError."""
        state = self.state
        if state.evaluated_at == state.step:
            return
        started = time.perf_counter()
        result = state.evaluation = self.evaluator.validate()
        state.evaluated_at = state.step
        if not np.isfinite(result.loss):
            raise self.not_finite(f"step {state.step}: the validation loss is {result.loss}")
        last = state.step == self.config.training.max_steps
        beyond = state.beyond_block = self.evaluator.validate_beyond_block(self.tracker.say) if last else None
        figures, histograms = self.evaluator.activity()
        self.follow_folder()
        if histograms:
            self.tracker.histograms(state.step, histograms)
        self.tracker.evaluation(
            {
                "step": state.step,
                "tokens": state.tokens,
                **result.figures(),
                **({} if beyond is None else beyond_block_figures(beyond)),
                **figures,
                **({"validation_answer_tokens": result.tokens} if self.config.data.has_chats() else {}),
                "evaluation_seconds": time.perf_counter() - started,
            }
        )

    # ----------------------------------------------------------------------------------- checkpoints and endings

    def save(self, scheduled: bool = True) -> bool:
        """Begins to write a checkpoint, or, if it is not scheduled, writes it; False if it cannot be written.

        One that is not scheduled, of a run that is interrupted, never counts as the best: it would not be there had
        the run not been interrupted.
        """
        self.follow_folder()
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
        memory = self.accumulator.memory
        carried = None if memory is None else memory.tensors(self.processes.mesh)
        tensors = checkpoint.collect(self.model, self.optimizer, carried, self.parallel_model.names)
        kept = state_to_save(state, self.config, self.data, self.processes, self.base, self.hardware())
        self.saver.save(state.step, tensors, kept, failed)
        return True if scheduled and not last else self.saver.wait()

    def follow_folder(self) -> None:
        """Makes sure that what is written next goes into the run's folder, which may have been renamed or removed.

        If it was removed, it is made again, as the weights are still here. Either way the run stops after this step,
        as its settings name the old folder. Called before anything is written.

        Raises:
            BDHError: It was removed and cannot be made again.
        """
        location = self.processes.on_main(self.folder.location)
        if location == self.folder.path:
            return
        self.saver.wait()
        if location is None:
            self.folder_change = "removed"
            self.state.saved_at, self.state.best_checkpoint, self.state.best_validation_loss = -1, None, None
            location = self.processes.on_main(lambda: self.folder.recreate(self.config))
        else:
            self.folder_change = f"renamed to {location}"
            self.processes.on_main(self.folder.remove_if_empty)  # the checkpoint being written may have made it anew
        self.folder.move(location)
        self.tracker.write_into(location)

    def folder_changed(self) -> BDHError:
        """The error that stops a run whose folder was renamed or removed, once a checkpoint is saved."""
        saved = self.saver.wait() if self.state.saved_at == self.state.step else self.save(scheduled=False)
        step, resume_hint = self.state.step, self.processes.on_main(self.folder.way_on)
        outcome = f"is saved in {self.folder.path}" if saved else "could not be saved"
        return BDHError(
            f"run_dir {self.run_dir} was {self.folder_change} during the run, so training stops; a checkpoint of step "
            f"{step} {outcome}; {resume_hint}"
        )

    def finish(self) -> None:
        """The end of a run: a last validation and checkpoint, the curves, and the export of the best checkpoint."""
        if self.state.saved_at != self.state.step:
            self.evaluate()
            saved = self.save()
        else:
            saved = self.saver.wait()
        self.follow_folder()
        if self.folder_change is not None:
            raise self.folder_changed()
        if not saved:
            raise BDHError(f"the last checkpoint could not be written; make room, then {self.folder.way_on()}")
        for line in self.data.source.remarks():
            self.tracker.say(f"notice: {line}")
        self.processes.on_main(self.publish)

    def publish(self) -> None:
        """Draws the curves, and makes the export. For the main process."""
        self.tracker.draw()
        best, start = self.state.best_checkpoint, self.config.init_from
        export_run(self.folder.path, best, None if start is None else Path(start), self.tracker.say)

    def interrupted(self, number: signal.Signals) -> Outcome:
        """Stopped by a signal: save, draw what there is, say how to go on."""
        state = self.state
        if not all(torch.isfinite(local_shard(p)).all() for p in self.model.parameters()):
            raise self.not_finite(f"step {state.step}: weights are not finite")
        self.follow_folder()
        saved = self.saver.wait() if state.saved_at == state.step else self.save(scheduled=False)
        self.processes.on_main(self.tracker.draw)
        way_on = self.processes.on_main(self.folder.way_on)
        where = f"saved at step {state.step} of {self.config.training.max_steps}; " if saved else "not saved; "
        self.tracker.say(f"stopped by {number.name}, {where}{way_on}")
        return Outcome(self.folder.path, state.step, number, state.evaluation, state.seconds)

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
        """Describes the device in words."""
        count = self.processes.size
        return hardware(self.device) if count == 1 else f"{count} x {hardware(self.device)}"

    def precision(self) -> Any:
        return autocast(self.config.training, self.device)
