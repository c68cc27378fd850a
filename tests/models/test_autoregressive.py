"""The autoregressive transformer, against diffusers' and transformers' classes on the same weights."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from conf.compose import ROOT
from conf.schema import build
from models.autoregressive import AutoregressiveTransformer, Cache
from models.initialization import initialize
from models.vq import VQModel

SMALL = {"codes": 20, "length": 12, "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 4}


def small(**settings) -> AutoregressiveTransformer:
    return initialize(AutoregressiveTransformer(**(SMALL | {"cross_attention_dim": 6} | settings)), seed=0)


def tokens(n: int = 2, length: int = 12) -> Tensor:
    return torch.randint(20, (n, length), generator=torch.Generator().manual_seed(1))


def context(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(2))


def test_it_has_the_published_number_of_parameters():
    """The published checkpoints are of 2.9 GB: weights and both moments in float32, and a VQGAN of 256 channels."""
    with torch.device("meta"):
        network = build(OmegaConf.load(ROOT / "model" / "rarm.yaml"))
        vqgan = VQModel(
            block_out_channels=[128, 128, 256, 256, 512], layers_per_block=2, latent_channels=256,
            num_vq_embeddings=16384, down_block_types=["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        )  # fmt: skip
    count, of_vqgan = (sum(p.numel() for p in one.parameters()) for one in (network, vqgan))
    block = 3 * 768**2 + 2 * (768**2 + 768) + 768**2 + 2 * 512 * 768 + 12 * 768**2 + 9 * 768 + 3 * 2 * 768
    assert count == 18 * block + (16386 + 256) * 768 + 769 * 16384 == 230_874_112
    assert round(4 * (3 * count + of_vqgan) / 2**30, 1) == 2.9


@pytest.mark.parametrize("settings", [{}, {"gated": False, "qkv_bias": True, "final_norm": True, "head_bias": False}])
def test_no_token_sees_a_later_one_and_all_see_those_before(settings):
    network, given, asked = small(**settings), tokens(), context()
    whole = network(given, asked)
    for place in range(12):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 20
        moved = (network(changed, asked) - whole).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == [i >= place for i in range(12)]
    assert (network(given, asked + 1) - whole).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 6]])
def test_logits_with_a_cache_are_those_without(parts):
    network, given, asked = small(), tokens(), context()
    cache, logits = Cache(2, 12), []
    for part in given.split(parts, dim=1):
        logits.append(network(part, asked, cache))
    torch.testing.assert_close(torch.cat(logits, dim=1), network(given, asked), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="13 tokens, and positions for 12"):
        network(given[:, :1], asked, cache)


def test_a_block_is_that_of_diffusers_under_a_causal_mask():
    block = small().blocks[1]
    theirs = BasicTransformerBlock(12, 3, 4, cross_attention_dim=6, activation_fn="geglu").eval()
    weights = block.state_dict()
    renamed = {
        "norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "own.to_q": "attn1.to_q", "cross.to_q": "attn2.to_q",
        "own.to_out": "attn1.to_out.0", "cross.to_out": "attn2.to_out.0", "mlp.up": "ff.net.0.proj",
        "mlp.down": "ff.net.2",
    }  # fmt: skip
    state = {}
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith("to_kv"):
            attention = "attn1" if module.startswith("own") else "attn2"
            state[f"{attention}.to_k.{leaf}"], state[f"{attention}.to_v.{leaf}"] = weight.chunk(2)
        else:
            state[f"{renamed[module]}.{leaf}"] = weight
    theirs.load_state_dict(state)
    x = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(3))
    causal = torch.full((12, 12), -torch.inf).triu(1).expand(2, -1, -1)
    expected = theirs(x, attention_mask=causal, encoder_hidden_states=context())
    torch.testing.assert_close(block(x, context()), expected, rtol=1e-5, atol=1e-5)


def test_a_gpt_is_that_of_transformers():
    network = small(tokens=21, cross_attention_dim=12, gated=False, qkv_bias=True, final_norm=True, head_bias=False)
    config = GPT2Config(
        vocab_size=21, n_positions=12, n_embd=12, n_layer=2, n_head=3, activation_function="gelu",
        add_cross_attention=True, tie_word_embeddings=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = GPT2LMHeadModel(config).eval()
    for i, parameter in enumerate(network.parameters()):  # biases too
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    ours = network.state_dict()
    head = torch.cat([ours["head.weight"], torch.zeros(1, 12)])  # which gives logits of the start, too
    state = {"transformer.wte.weight": ours["embed_tokens.weight"], "lm_head.weight": head}
    state |= {"transformer.wpe.weight": ours["embed_positions.weight"]}
    state |= {f"transformer.ln_f.{leaf}": ours[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    for i in range(2):
        names = {"norm1": "ln_1", "norm2": "ln_cross_attn", "norm3": "ln_2", "own.to_out": "attn.c_proj"}
        names |= {"cross.to_out": "crossattention.c_proj", "cross.to_q": "crossattention.q_attn"}
        names |= {"cross.to_kv": "crossattention.c_attn", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        for leaf in ("weight", "bias"):
            own = {n: ours[f"blocks.{i}.{m}.{leaf}"] for m, n in names.items()}
            own["attn.c_attn"] = torch.cat([ours[f"blocks.{i}.own.{m}.{leaf}"] for m in ("to_q", "to_kv")])
            state |= {
                f"transformer.h.{i}.{n}.{leaf}": w if "ln_" in n or leaf == "bias" else w.T for n, w in own.items()
            }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "masked_bias" not in name and "attn.bias" not in name]
    asked = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(4))
    expected = theirs(input_ids=tokens(), encoder_hidden_states=asked).logits
    torch.testing.assert_close(network(tokens(), asked), expected[..., :20], rtol=1e-4, atol=1e-4)


def test_flops_are_those_that_torch_counts():
    network = small()
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(tokens(1).to("meta"), context(1).to("meta"))
    assert network.flops(3, 4, 3) == counter.get_total_flops()
    assert small(cross_attention_dim=None).flops(3, 4, 0) < network.flops(3, 4, 3)
    with pytest.raises(ValueError, match="4 x 4 codes are more than length=12"):
        network.grid(4, 4)


def test_each_code_is_predicted_from_the_start_and_those_before():
    network = small()
    assert network.inputs(torch.tensor([[3, 4, 5]])).tolist() == [[21, 3, 4]]
    with pytest.raises(ValueError, match="tokens=20: more than the 20 codes"):
        small(tokens=20)
