"""Compact record of a text that a model read, from which all activity can be computed again.

The activity of a neuron is a function of the input x of its layer, X = relu(x E), and so are the synapses that a token
writes and reads. So the record keeps one vector for each token and layer, and `bdh.insight.layer_study` computes
activity and synapses from it exactly, on request. The activity itself, stored sparsely, would take about forty times
the memory. Where synapses decay, the record also keeps the retention of each token. With the delta rule a token's write
depends on all tokens before it, so the record keeps the attention A as well.

A *raster* is a picture of a layer's activity in at most `BINS` bytes: see `raster_of`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.model import BDHConfig, BDHState
from bdh.model.modeling_bdh import synapse_dtype

BINS = 256


class Record:
    """The last tokens that an observer read, numbered from 0.

    Attributes:
        tokens: Their ids; the arrays below hold as many rows that count.
        vectors: What came into each layer, (max_tokens, L, D), in the model's dtype, on the CPU.
        rasters: (max_tokens, L, bins) uint8.
        shares: Which part of the neurons was active, (max_tokens, L) float32.
        log_decay: Logarithm of the retention of each head, (max_tokens, L, h); None if the synapses do not decay. This
            and the next two in float32, or in float64 if the model is.
        write_strength: beta of each head, (max_tokens, L, h); None without the delta rule, as the next two.
        key_lengths: Length of each head's activity, by which its key is divided, (max_tokens, L, h).
        attention: A of each head, (max_tokens, L, h, D), in the model's dtype.
        base: The synapses before token 0, None if there were none. Nobody changes them.
        start: Position of token 0 in the text.
    """

    def __init__(self, config: BDHConfig, max_tokens: int, dtype: torch.dtype = torch.float32):
        self.config = config
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        L = config.n_layer
        self.vectors = torch.empty(max_tokens, L, config.n_embd, dtype=dtype)  # memory is taken where it is written
        self.rasters = np.empty((max_tokens, L, bins_of(config.n_neurons)), dtype=np.uint8)
        self.shares = np.empty((max_tokens, L), dtype=np.float32)
        h, wide = config.n_head, synapse_dtype(dtype)
        delta = config.write == "delta"
        self.log_decay = None if config.decay == "none" else torch.empty(max_tokens, L, h, dtype=wide)
        self.write_strength = torch.empty(max_tokens, L, h, dtype=wide) if delta else None
        self.key_lengths = torch.empty(max_tokens, L, h, dtype=wide) if delta else None
        self.attention = torch.empty(max_tokens, L, h, config.n_embd, dtype=dtype) if delta else None
        self.base: BDHState | None = None
        self.start = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def token_nbytes(self) -> int:
        """Bytes that a token takes; 7704 at the default sizes in float32, and 32568 with decay and the delta rule."""
        gates = (self.log_decay, self.write_strength, self.key_lengths, self.attention)
        nbytes = self.vectors.nbytes + self.rasters.nbytes + self.shares.nbytes
        return (nbytes + sum(values.nbytes for values in gates if values is not None)) // self.max_tokens

    def add(
        self,
        tokens: Sequence[int],
        vectors: Tensor,
        rasters: Tensor,
        shares: Tensor,
        log_decay: Tensor | None = None,
        write_strength: Tensor | None = None,
        key_lengths: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> None:
        """Adds T tokens, as many as there is room for: vectors (T, L, D), rasters (T, L, bins) uint8, shares (T, L).

        Where the model has gates: log_decay, write_strength and key_lengths (T, L, h), and attention (T, L, h, D).
        """
        rows = slice(len(self), len(self) + len(tokens))
        gates = (
            (self.log_decay, log_decay),
            (self.write_strength, write_strength),
            (self.key_lengths, key_lengths),
            (self.attention, attention),
        )
        for kept, values in gates:
            assert (kept is None) == (values is None)
            if kept is not None and values is not None:
                kept[rows] = values.cpu()
        self.vectors[rows] = vectors.cpu()
        self.rasters[rows] = rasters.cpu().numpy()
        self.shares[rows] = shares.cpu().numpy()
        self.tokens += tokens  # last: whoever reads in another thread finds whole tokens only


def bins_of(n: int) -> int:
    """The number of raster bins for n neurons: n, or up to `BINS` bins of ceil(n / BINS) neurons, the last maybe
    with fewer."""
    return math.ceil(n / math.ceil(n / BINS))


def raster_of(X: Tensor, D: int) -> Tensor:
    """Pictures of activity, (T, n) -> (T, bins) uint8.

    Bin b is of the neurons b * w to (b + 1) * w - 1, w = ceil(n / BINS). Its byte tells the largest activity a among
    them: 0 if all are silent, else ceil(255 * sqrt(a / sqrt(D))), at most 255. The root keeps weak activity visible;
    sqrt(D), the length of x, is what a neuron shows whose weights have the length 1 and point where x does. The
    strongest of trained models come to about half of that.
    """
    n = X.shape[-1]
    bins = bins_of(n)
    width = math.ceil(n / BINS)
    X = F.pad(X, (0, bins * width - n))  # (T, bins * width)
    largest = X.unflatten(-1, (bins, width)).amax(-1).float()  # (T, bins)
    return (largest / math.sqrt(D)).sqrt().mul(255).ceil().clamp(max=255).to(torch.uint8)
