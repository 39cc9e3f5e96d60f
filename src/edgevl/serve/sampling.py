"""Sampling parameters of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgevl.errors import ContextLengthError
from edgevl.generate.constraint import Constraint
from edgevl.generate.sampling import SamplingParams
from edgevl.preprocess import Prompt
from edgevl.serve.answers import Question
from edgevl.serve.errors import ApiError, blamed_on
from edgevl.serve.requests import MAX_ANSWERS, Sampling
from edgevl.serve.service import Loaded

#: Seeds of the API may be negative, the sampler's may not.
_SEEDS = 2**64


def check_length(prompt: Prompt, max_context: int) -> Prompt:
    """Return ``prompt``, if the context holds it and a token of the answer.

    Raises:
        ContextLengthError: it does not.
    """
    length = len(prompt.token_ids)
    if length >= max_context:
        raise ContextLengthError(
            f"the prompt has {length} tokens, but the context holds {max_context}, answer "
            "included: shorten it, or use fewer pictures, tiles (max_tiles) or frames of videos"
        )
    return prompt


def questions(
    request: Sampling,
    loaded: Loaded,
    prompts: Sequence[Prompt],
    max_tokens: int,
    max_queue: int,
    constraint: Constraint | None = None,
) -> list[Question]:
    """Return what is to be answered: each prompt ``n`` times, with seeds that count up.

    Args:
        request: says how.
        loaded: has the model's defaults and tokenizer.
        prompts: what to answer.
        max_tokens: most tokens of each answer.
        max_queue: most answers that may wait: a request with more would never be taken.
        constraint: what each answer must be.

    Raises:
        ApiError: there are too many, or a parameter is out of its range.
    """
    n = request.n or 1
    most = min(MAX_ANSWERS, max_queue)
    if n * len(prompts) > most:
        raise ApiError(400, f"n: at most {most} answers to all prompts together", "n")
    given = request.options() | {"max_tokens": max_tokens, "constraint": constraint}
    if request.seed is not None:
        given["seed"] = request.seed % _SEEDS
    with blamed_on("logit_bias"):  # all else has been checked with the body
        params = SamplingParams.resolve(loaded.sampling, given)
        params.check_tokens(loaded.prompts.tokenizer)
    every = [params]
    for number in range(1, n):
        seed = None if params.seed is None else (params.seed + number) % _SEEDS
        every.append(replace(params, seed=seed))
    return [Question(prompt, params) for prompt in prompts for params in every]
