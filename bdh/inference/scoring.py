"""Log-probabilities of the tokens of a text, with the model's own forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdh.errors import BDHError
from bdh.inference.outputs import TokenLogprob, token_logprobs
from bdh.inference.request import PromptLogprobs
from bdh.model import BDHForCausalLM, BDHState

CHUNK = 64  # tokens read at once, between which the engine may step


class Scorer:
    """Scores a text chunk by chunk; `scores` has an entry for each token but the first when it is `done`.

    Args:
        model: The model.
        tokens: Token ids of the text, at least one.
        top: Number of the likeliest tokens to report at each position.

    Raises:
        BDHError: There is no model or no token, or a token is not in the vocabulary.
    """

    def __init__(self, model: BDHForCausalLM | None, tokens: Sequence[int], top: int = 0):
        if model is None:
            raise BDHError("a text cannot be scored here: the runner keeps no model")
        size = model.config.vocab_size
        if not tokens or not 0 <= min(tokens) <= max(tokens) < size:
            raise BDHError(f"a text to score has at least one token, and only the model's, 0 to {size - 1}")
        self.model = model
        self.tokens = list(tokens)
        self.top = min(top, size)
        self.scores: list[TokenLogprob] = []
        self.read = 0
        self.state = BDHState.zeros(model.config, 1, model.device)

    @property
    def done(self) -> bool:
        return len(self.scores) == len(self.tokens) - 1

    @torch.inference_mode()
    def read_chunk(self) -> None:
        """Read the next tokens and score the token after each."""
        ids = torch.tensor([self.tokens[self.read : self.read + CHUNK]], device=self.model.device)  # (1, T)
        targets = self.tokens[self.read + 1 : self.read + 1 + ids.shape[1]]  # T, or T - 1 at the end
        logits = self.model(ids, past_key_values=self.state, use_cache=True).logits[0, : len(targets)]  # (T, V)
        self.read += ids.shape[1]
        self.scores += token_logprobs(targets, score_tokens(logits, targets, self.top))


def score_tokens(logits: Tensor, targets: Sequence[int], top: int) -> PromptLogprobs:
    """Return the log-probabilities of tokens from the logits (T, V) before each, and of the `top` likeliest ones."""
    logprobs = logits.float().log_softmax(-1)  # (T, V)
    best = logprobs.topk(min(top, logits.shape[-1]), dim=-1)  # 2 x (T, k)
    ids = torch.tensor(targets, dtype=torch.int64, device=logits.device)  # (T)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]  # (T)
    return PromptLogprobs(chosen.cpu().numpy(), best.indices.int().cpu().numpy(), best.values.cpu().numpy())
