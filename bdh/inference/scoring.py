"""How likely a text is, token by token, with the model's own forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdh.errors import BDHError
from bdh.inference.outputs import TokenLogprob, token_logprobs
from bdh.inference.request import PromptLogprobs
from bdh.model import BDHForCausalLM, BDHState

PIECE = 64  # tokens read at once: others may go on in between


class Scorer:
    """Reads a text piece by piece, in float32 logits; `scores` has each token's but the first's when it is `done`.

    Args:
        model: What says how likely a token is.
        tokens: Of the text, at least one.
        top: How many of the likeliest tokens to tell in the place of each.

    Raises:
        BDHError: There is no model, no token, or an unknown one.
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
    def read_piece(self) -> None:
        """Reads the next tokens and scores those that follow them."""
        ids = torch.tensor([self.tokens[self.read : self.read + PIECE]], device=self.model.device)  # (1, T)
        followers = self.tokens[self.read + 1 : self.read + 1 + ids.shape[1]]  # T, or T - 1 at the end
        logits = self.model(ids, past_key_values=self.state, use_cache=True).logits[0, : len(followers)]  # (T, V)
        self.read += ids.shape[1]
        self.scores += token_logprobs(followers, score_tokens(logits, followers, self.top))


def score_tokens(logits: Tensor, followers: Sequence[int], top: int) -> PromptLogprobs:
    """The log-probabilities of tokens by the logits (T, V) before each, and of the `top` likeliest in their places."""
    logprobs = logits.float().log_softmax(-1)  # (T, V)
    best = logprobs.topk(min(top, logits.shape[-1]), dim=-1)  # 2 x (T, k)
    ids = torch.tensor(followers, dtype=torch.int64, device=logits.device)  # (T)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]  # (T)
    return PromptLogprobs(chosen.cpu().numpy(), best.indices.int().cpu().numpy(), best.values.cpu().numpy())
