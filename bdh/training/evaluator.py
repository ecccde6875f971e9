"""Evaluation during training: validation loss, activity of neurons, and samples."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.blocks import ValidationWindows
from bdh.data.loader import TrainingData
from bdh.distributed.parallel import ParallelModel
from bdh.distributed.processes import Processes
from bdh.errors import BDHError
from bdh.evaluation.by_position import LONG_WINDOWS, PositionBin, long_length, score_beyond_block
from bdh.inference.llm import sample_answers, sample_texts
from bdh.inference.sampling_params import SamplingParams
from bdh.model.model_card import state_bytes
from bdh.training.config import TrainConfig
from bdh.training.neuron_statistics import observe_activity
from bdh.training.norms import Histogram, weight_histograms
from bdh.training.trackers import want_histograms
from bdh.training.validation import Evaluation, check_has_targets, evaluate

LONG_STATES = 1 << 30  # bytes of the states of the long windows that are read at once


class Evaluator:
    """Evaluates the model between training steps. All processes of a run call its methods together.

    Args:
        config: The configuration of the run.
        parallel_model: The model.
        processes: The processes that share the validation text.
        data: The training data, with the validation text.
        tokenizer: The tokenizer for samples.
        end_of_text: The token that ends documents, which are then separated; None reads across documents.
        precision: Returns the context of a forward pass.

    Attributes:
        windows: The windows of the validation text that are scored.

    Raises:
        BDHError: The windows contain no target token.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel_model: ParallelModel,
        processes: Processes,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerFast,
        end_of_text: int | None,
        precision: Callable[[], AbstractContextManager[object]],
    ):
        self.config = config
        self.parallel_model = parallel_model
        self.processes = processes
        self.data = data
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text
        self.precision = precision
        self.windows = self.sample_windows(config.training.eval_windows)
        check_has_targets(self.windows, config.training.eval_batch_size, config.training.carry_state)

    def sample_windows(self, count: int | None) -> ValidationWindows:
        return ValidationWindows(self.data.validation, self.config.data.block_size, count, whole=count is None)

    def validate(self) -> Evaluation:
        """Compute loss and accuracy on the windows."""
        settings = self.config.training
        with self.parallel_model.keep_unsharded():
            return evaluate(
                self.parallel_model.model,
                self.windows,
                self.data.validation_bytes_per_token,
                settings.eval_batch_size,
                self.precision,
                end_of_text=self.end_of_text,
                carry_state=settings.carry_state,
                share=self.processes.share,
                together=self.processes.sum,
            )

    def validate_beyond_block(self, say: Callable[[str], None]) -> PositionBin | None:
        """Compute the loss of long windows at positions beyond the training block; up to twice as slow as `validate`.

        Every process reads all of these windows.

        Args:
            say: Called with the reason where there is nothing to measure, or no memory for it.
        """
        block_size, settings, model = self.config.data.block_size, self.config.training, self.parallel_model.model
        tokens = self.data.validation
        length = long_length(len(tokens), block_size)
        if length is None:
            say(
                f"validation beyond the block is skipped: the validation text has {len(tokens):,} tokens; "
                f"{2 * block_size + 1:,} are needed, two blocks"
            )
            return None
        # A quarter of the tokens of a validation: one that is read with carried state costs several times as much.
        affordable = len(self.windows) * block_size // self.processes.share.world // length // 4
        windows = ValidationWindows(tokens, length, min(max(affordable, 1), LONG_WINDOWS))
        rows = max(min(settings.eval_batch_size, LONG_STATES // state_bytes(model.config)), 1)
        try:
            with self.parallel_model.keep_unsharded():
                return score_beyond_block(
                    model,
                    windows,
                    block_size,
                    self.data.validation_bytes_per_token,
                    rows,
                    precision=self.precision,
                    end_of_text=self.end_of_text,
                )
        except torch.OutOfMemoryError:
            if not self.processes.alone:  # the others wait for this one
                raise
            say("validation beyond the block is skipped: there is not enough memory for the states of long windows")
        except BDHError as error:
            say(f"validation beyond the block is skipped: {error}")
        return None

    def activity(self) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Measure the activity of neurons on a few windows; histograms only if a tracker can display them.

        Metrics are of the whole model, histograms of the part that this process holds.
        """
        count = self.config.logging.activity_windows
        detailed = want_histograms(self.config.logging)
        histograms = weight_histograms(self.parallel_model.model) if detailed else {}
        figures: dict[str, float] = {}
        if count:
            few = self.sample_windows(count)
            figures, of_activity = observe_activity(
                self.parallel_model.model, few, self.precision, self.end_of_text, detailed
            )
            histograms |= of_activity
        return self.parallel_model.gather_metrics(figures), histograms

    def samples(self, step: int) -> list[tuple[str, str]]:
        """Continue the configured prompts with a seed that depends on the step; return prompts and continuations."""
        logging = self.config.logging
        params = SamplingParams(
            max_new_tokens=logging.sample_tokens,
            temperature=logging.sample_temperature,
            seed=(self.config.training.seed + step) % 2**63,
        )
        chat = self.config.data.has_chats()
        write = sample_answers if chat else sample_texts
        with self.parallel_model.keep_unsharded():  # all processes write the same
            texts = write(self.parallel_model.model, self.tokenizer, logging.sample_prompts, params)
        prompts = [prompt + "\n" * chat for prompt in logging.sample_prompts]
        return list(zip(prompts, texts, strict=True))
