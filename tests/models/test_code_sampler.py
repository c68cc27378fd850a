"""Codes drawn one after the other, against transformers' filters and closed forms."""

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models.autoregressive import AutoregressiveTransformer
from models.code_sampler import CodeSampler, draw
from models.initialization import initialize


def network() -> AutoregressiveTransformer:
    return initialize(
        AutoregressiveTransformer(20, None, 9, 2, 2, 4, cross_attention_dim=6),
        seed=0,
    )


def uniform(n: int = 3, steps: int = 9) -> Tensor:
    return torch.rand(n, steps, generator=torch.Generator().manual_seed(0))


def context(seed: int, n: int = 3) -> Tensor:
    return torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 5, 1.0), (1.0, None, 0.6), (1.3, 8, 0.9)])
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(float(temperature))(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k is not None else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(CodeSampler(temperature, top_k, top_p).filtered(logits), expected)


def test_codes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, 2.0, -torch.inf])
    numbers = (torch.arange(100_000) + 0.5) / 100_000
    codes = draw(logits.expand(len(numbers), -1), numbers)
    shares = torch.bincount(codes, minlength=6) / len(numbers)
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=2e-5)
    assert draw(logits[None], torch.tensor([0.0])).item() == 1
    assert draw(logits[None], torch.tensor([1 - 2**-24])).item() == 4, "the last that is possible"


def test_cached_sampling_is_uncached_sampling():
    for null in (None, context(1)):
        asked = (network(), uniform(), context(0), null, 2.0)
        cached, uncached = (CodeSampler(top_k=None, cached=cached).sample(*asked) for cached in (True, False))
        assert torch.equal(cached, uncached) and cached.shape == (3, 9) and len(cached.unique()) > 5


def test_a_picture_is_the_same_in_any_company():
    whole = CodeSampler().sample(network(), uniform(), context(0))
    assert torch.equal(CodeSampler().sample(network(), uniform()[1:2], context(0)[1:2]), whole[1:2])


def test_the_likeliest_code_follows_where_one_is_left():
    """Greedily, against a loop that takes the network's argmax."""
    model, asked = network(), context(0)
    tokens = torch.full((3, 1), model.start)
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens, asked)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(CodeSampler(top_k=1).sample(model, uniform(), asked), tokens[:, 1:])


class Two(nn.Module):
    """Predicts its context, whatever came before."""

    start, length, blocks = 4, 99, ()

    def forward(self, tokens: Tensor, context: Tensor, cache: object = None) -> Tensor:
        return context[:, :1].expand(-1, tokens.shape[1], -1)


def test_guidance_leads_logits_from_the_unconditional_ones():
    conditional, null = torch.tensor([[[0.0, 1, 0, 2]]]), torch.tensor([[[0.0, 2, 0, 1]]])
    numbers = (torch.arange(99) + 0.5)[None] / 99
    guided = CodeSampler(top_k=None).sample(Two(), numbers, conditional, null, 1.5)
    logits = (null + 1.5 * (conditional - null))[0, 0]
    assert torch.equal(guided[0], draw(logits.expand(99, -1), numbers[0]))
    assert not torch.equal(guided, CodeSampler(top_k=None).sample(Two(), numbers, conditional))


def test_settings_out_of_range_are_refused():
    for key, value in {"temperature": 0, "top_k": 0, "top_p": 1.5}.items():
        with pytest.raises(ValueError, match=f"{key}={value}"):
            CodeSampler(**{key: value})
