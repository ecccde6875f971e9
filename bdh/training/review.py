"""What a run looks at between its steps: how well the model predicts, what its neurons do, what it writes."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.blocks import ValidationWindows
from bdh.data.loader import TrainingData
from bdh.errors import BDHError
from bdh.evaluation.by_position import LONG_WINDOWS, PositionBin, long_length, score_beyond_block
from bdh.inference.llm import sample_answers, sample_texts
from bdh.inference.params import SamplingParams
from bdh.model.card import state_bytes
from bdh.training.activity import observe_activity
from bdh.training.config import TrainConfig
from bdh.training.evaluation import Evaluation, check_has_targets, evaluate
from bdh.training.norms import Histogram, weight_histograms
from bdh.training.processes import Processes
from bdh.training.spread import Spread
from bdh.training.trackers import want_histograms

LONG_STATES = 1 << 30  # bytes of the states of the long windows that are read at once


class Review:
    """Looks at a model, and leaves it as it is. All processes of a run call it together.

    Args:
        config: The run's.
        spread: The model.
        processes: Who shares the validation text.
        data: Where that text is.
        tokenizer: For what is written.
        end_of_text: The token that ends documents, which are then kept apart; None reads across them.
        precision: Makes the context of a forward pass.

    Attributes:
        windows: What is scored.

    Raises:
        BDHError: Nothing in the windows is to be predicted.
    """

    def __init__(
        self,
        config: TrainConfig,
        spread: Spread,
        processes: Processes,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerFast,
        end_of_text: int | None,
        precision: Callable[[], AbstractContextManager[object]],
    ):
        self.config = config
        self.spread = spread
        self.processes = processes
        self.data = data
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text
        self.precision = precision
        self.windows = self.some_windows(config.training.eval_windows)
        check_has_targets(self.windows, config.training.eval_batch_size, config.training.carry_state)

    def some_windows(self, count: int | None) -> ValidationWindows:
        return ValidationWindows(self.data.validation, self.config.data.block_size, count, whole=count is None)

    def validate(self) -> Evaluation:
        """Scores the windows."""
        settings = self.config.training
        with self.spread.whole_steps():
            return evaluate(
                self.spread.model,
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
        """Scores long windows at the positions beyond the training block; takes up to twice as long as `validate`.

        Every process reads all of these windows.

        Args:
            say: Called with the reason where there is nothing to measure, or no memory for it.
        """
        block_size, settings, model = self.config.data.block_size, self.config.training, self.spread.model
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
            with self.spread.whole_steps():
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
        """How active the neurons are on a few windows of the validation text; histograms, if a tracker can have them.

        Figures are of the whole model; histograms of what is here of it.
        """
        count = self.config.logging.activity_windows
        detailed = want_histograms(self.config.logging)
        histograms = weight_histograms(self.spread.model) if detailed else {}
        figures: dict[str, float] = {}
        if count:
            few = self.some_windows(count)
            figures, of_activity = observe_activity(self.spread.model, few, self.precision, self.end_of_text, detailed)
            histograms |= of_activity
        return self.spread.together(figures), histograms

    def samples(self, step: int) -> list[tuple[str, str]]:
        """What the model writes on from the fixed prompts, with a seed of the step's own: prompts and continuations."""
        logging = self.config.logging
        params = SamplingParams(
            max_new_tokens=logging.sample_tokens,
            temperature=logging.sample_temperature,
            seed=(self.config.training.seed + step) % 2**63,
        )
        chat = self.config.data.has_chats()
        write = sample_answers if chat else sample_texts
        with self.spread.whole_steps():  # all processes write the same
            texts = write(self.spread.model, self.tokenizer, logging.sample_prompts, params)
        said = [prompt + "\n" * chat for prompt in logging.sample_prompts]
        return list(zip(said, texts, strict=True))
