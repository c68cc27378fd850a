"""Latent diffusion's transformer against diffusers' LDMBertModel on the same weights; captions' and layouts' tokens."""

from pathlib import Path

import pytest
import torch

from models.conditioner import Conditioner
from models.given import Given
from models.initialization import initialize
from models.layout import Layout, LayoutEncoder
from models.token_transformer import BertTextEncoder, TokenTransformer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "##s", "of"]
TINY = {"width": 12, "layers": 3, "heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """BERT's vocabulary in small, and random weights of diffusers' class."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("ldm")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizer(str(vocabulary)).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    settings = {"d_model": 12, "encoder_layers": 3, "encoder_attention_heads": 2, "head_dim": 8, "encoder_ffn_dim": 48}
    config = LDMBertConfig(vocab_size=len(WORDS), max_position_embeddings=10, **settings)
    model = LDMBertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "bert")
    return folder


def text(place: Path, **options) -> BertTextEncoder:
    options = {"vocabulary": len(WORDS), "length": 10, "folder": str(place / "bert")} | TINY | options
    return BertTextEncoder(str(place), tokenizer_subfolder="tokenizer", **options)


def test_it_agrees_with_diffusers_on_the_same_weights_and_captions(folder: Path):
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
    from transformers import BertTokenizer

    captions = ["a red circle", "", "blue circles of a red circle of a blue circle of red"]
    conditioner = initialize(Conditioner([text(folder)], dropped="empty"), seed=0)
    ours = conditioner(Given(captions))
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    told = {"padding": "max_length", "max_length": 10, "truncation": True, "return_tensors": "pt"}
    theirs = LDMBertModel.from_pretrained(folder / "bert").eval()
    with torch.no_grad():
        expected = theirs(tokenizer(captions, **told).input_ids)[0]
        null = theirs(tokenizer(["", "", ""], **told).input_ids)[0]
    torch.testing.assert_close(ours["context"], expected, rtol=1e-5, atol=1e-5)
    assert ours["pooled"].shape == (3, 0) and expected.std() > 0.1
    dropped = conditioner(Given(captions), conditioner.unconditional(3))["context"]
    torch.testing.assert_close(dropped, null, rtol=1e-5, atol=1e-5)


def test_published_sizes_and_first_values():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    with torch.device("meta"):
        ours = TokenTransformer(30522, 77, 1280, 32)
        theirs = LDMBertModel(LDMBertConfig()).model
        layout = LayoutEncoder()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert layout.length == 92 and len(layout.model.layers) == 16 and layout.width == 512
    small = initialize(LayoutEncoder(classes=4, objects=2, vocabulary=26, **TINY), seed=1)
    values = dict(small.named_parameters())
    assert values["model.layers.0.fc1.bias"].abs().max() == 0 and values["model.layer_norm.weight"].min() == 1
    assert 0.01 < values["model.embed_tokens.weight"].std() < 0.03
    assert 0.1 < values["model.layers.1.self_attn.q_proj.weight"].abs().max() <= 12**-0.5


def test_weights_and_tokenizers_that_do_not_fit_are_refused(folder: Path):
    with pytest.raises(ValueError, match=r"is no LDMBertModel: it lacks model\.layers\.3"):
        initialize(Conditioner([text(folder, layers=4)]), seed=0)
    with pytest.raises(ValueError, match=r"model.embed_positions.weight is \(10, 12\), not \(9, 12\)"):
        initialize(Conditioner([text(folder, length=9)]), seed=0)
    with pytest.raises(ValueError, match="nowhere"):
        initialize(Conditioner([text(folder, folder=str(folder / "nowhere"))]), seed=0)
    small = initialize(text(folder, vocabulary=8, folder=None), seed=0)
    with pytest.raises(ValueError, match="has 11 tokens; vocabulary=8 is less"):
        small(["a"])


def test_a_layouts_tokens_are_labels_and_corners_on_a_grid():
    encoder = LayoutEncoder(classes=601, **TINY)
    whole = Layout((7, 600), ((0.0, 0.0, 1.0, 1.0), (0.5, 0.25, 0.75, 1.0)))
    tokens = encoder.tokens(whole)
    assert tokens[:6] == [7, 0, 8099, 600, round(0.25 * 89) * 90 + round(0.5 * 89), 89 * 90 + round(0.75 * 89)]
    assert tokens[6:90] == [8191] * 84 and tokens[90:] == [0, 8099]
    assert encoder.tokens(Layout(crop=(0.0, 0.5, 0.5, 1.0)))[90:] == [round(44.5) * 90, 89 * 90 + round(44.5)]
    many = Layout((1,) * 40, ((0.0, 0.0, 0.5, 0.5),) * 40)
    assert len(encoder.tokens(many)) == 92 and 8191 not in encoder.tokens(many)
    with pytest.raises(ValueError, match="label 601, and there are 601 classes"):
        encoder.tokens(Layout((601,), ((0.0, 0.0, 1.0, 1.0),)))
    with pytest.raises(ValueError, match="classes=8192"):
        LayoutEncoder(classes=8192)
    conditioner = initialize(Conditioner([LayoutEncoder(classes=601, **TINY)], dropped="empty"), seed=0)
    given = Given(["", ""], fields={"boxes": [whole, Layout()]})
    context = conditioner(given)["context"]
    assert context.shape == (2, 92, 12)
    torch.testing.assert_close(conditioner(given, torch.tensor([[False], [True]]))["context"][0], context[1])


def test_without_a_tokenizer_letters_are_tokens():
    encoder = initialize(BertTextEncoder(None, length=8, vocabulary=100, **TINY), seed=0)
    told = encoder.tokenizer(["ab c", "ab d"]).input_ids
    assert len(told[0]) == len(told[1]) == 5 and told[0][:3] == told[1][:3] and told[0] != told[1]
    states, _ = encoder(["ab c", "ab d"])
    assert states.shape == (2, 8, 12) and not torch.equal(*states)
