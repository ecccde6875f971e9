"""Beam search with the model's own `generate()`, outside the engine, one request at a time."""

from dataclasses import replace

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.outputs import Completion, RequestOutput, TextRequest
from bdh.inference.request import Event, FinishReason, Request
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHForCausalLM


def plain_request(model: BDHForCausalLM | None, request: Request) -> Request:
    """Return the request without beams, for the engine to check. Raises BDHError if beam search is impossible."""
    params = request.params
    if model is None:
        raise BDHError(f"num_beams is {params.num_beams}, which needs a model that is not quantized; leave it out")
    if params.presence_penalty or params.frequency_penalty:
        raise BDHError(
            f"num_beams is {params.num_beams}, which does not support presence_penalty and frequency_penalty; use "
            "repetition_penalty"
        )
    return replace(request, params=replace(params, num_beams=1, n=1, best_of=None))


@torch.inference_mode()
def beam_search(model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, text_request: TextRequest) -> Completion:
    """Return the `n` likeliest continuations found by `num_beams` beams, likeliest first, of a checked request."""
    request = text_request.request
    ids = torch.tensor([list(request.prompt)], device=model.device)  # (1, T)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=beam_config(request.params, sorted(request.ends) or [model.config.vocab_size]),
    )  # (n, T + new)
    output = RequestOutput(text_request, tokenizer)
    for index, row in enumerate(generated[:, ids.shape[1] :].tolist()):
        for number, token in enumerate(row, 1):
            finish_reason: FinishReason | None = "length" if number == len(row) else None
            if token in request.ends:  # padding follows
                finish_reason = "stop"
            if output.take(Event(request.id, index, token, finish_reason=finish_reason)) or finish_reason:
                break
    return output.completion()


def beam_config(params: SamplingParams, ends: list[int]) -> GenerationConfig:
    """Return the generation config. `ends` must not be empty, or the model's own end token would be used."""
    return GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens or None,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        do_sample=False,
        repetition_penalty=params.repetition_penalty,
        sequence_bias={(token,): float(bias) for token, bias in (params.logit_bias or {}).items()} or None,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
