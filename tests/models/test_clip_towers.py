"""The CLIP that is trained here, against transformers' own and the published one."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from models.clip import CLIP
from models.initialization import initialize
from models.text_training import train_clip_tokenizer

CAPTIONS = ["a red circle in the centre", "in the top left corner, a blue square", "there is a red square at the top"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 24, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 600, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    train_clip_tokenizer(CAPTIONS, folder, 600, 16)
    return folder


def test_the_published_size_and_its_flops():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = CLIP({}, {})
        network(torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long))
    assert sum(parameter.numel() for parameter in network.parameters()) == 151_277_313  # of openai's checkpoint
    assert counter.get_total_flops() == network.flops()


def test_it_begins_as_transformers_does():
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision, text = {**VISION, **tower}, {**TEXT, **tower}
    torch.manual_seed(0)
    theirs = dict(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64)).named_parameters())
    ours = dict(initialize(CLIP(vision, text, 64), seed=0).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        if name == "logit_scale" or parameter.std() == 0:
            assert torch.equal(ours[name].flatten(), parameter.flatten()), name
        else:
            few = 5 / parameter.numel() ** 0.5
            assert ours[name].std().item() == pytest.approx(parameter.std().item(), rel=few), name
            assert ours[name].mean().abs() < few * parameter.std(), name


def test_a_folder_opens_in_transformers_with_the_same_embeddings(tokenizer, tmp_path):
    network = initialize(CLIP(VISION, TEXT, 20, tokenizer=str(tokenizer)), seed=1)
    with torch.no_grad():
        network.logit_scale += 1
    network.save(tmp_path / "saved", network.state_dict())
    theirs, told = CLIPModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())
    pixels, tokens = torch.randn(3, 3, 24, 24), network.tokens(["a red circle", "", "blue"])
    given = AutoTokenizer.from_pretrained(tmp_path / "saved")(
        ["a red circle", "", "blue"], padding=True, return_tensors="pt"
    )
    assert given.input_ids.shape[1] < tokens.shape[1]  # they pad to the longest, and hide padding
    with torch.no_grad():
        images, texts, scale = network(pixels, tokens)
        assert torch.allclose(images, theirs.get_image_features(pixel_values=pixels).pooler_output, atol=1e-6)
        assert torch.allclose(texts, theirs.get_text_features(**given).pooler_output, atol=1e-6)
    assert scale.item() == theirs.logit_scale.item() == pytest.approx(3.6592)


def test_a_tokenizer_is_of_captions_in_any_order_and_tells_any_text(tokenizer, tmp_path):
    train_clip_tokenizer([CAPTIONS[2], *CAPTIONS[:2], CAPTIONS[0] + " "], tmp_path / "other", 600, 16)
    one, other = AutoTokenizer.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(tmp_path / "other")
    assert isinstance(one, CLIPTokenizer) and one.get_vocab() == other.get_vocab() and len(one) <= 600
    assert one.tokenize("A Red  circle") == other.tokenize("a red circle")
    assert one.tokenize("red square") == ["red</w>", "square</w>"]  # in more than one caption
    for text in ("zebra", "ξίφος", "🙂", "x1!", "q"):
        (ids,) = one([text]).input_ids
        assert ids[0] == 0 and ids[-1] == 1 and 1 not in ids[:-1], text  # an unknown token would be the end's
        assert one.decode(ids, skip_special_tokens=True).replace(" ", "") == text
    network = CLIP(VISION, TEXT, 20, tokenizer=str(tokenizer))
    assert network.tokens(["", "red"])[0].tolist() == network.tokens([""])[0].tolist() == [0] + [1] * 15
    assert network.tokens(["red " * 30])[0, -1] == 1


def test_what_does_not_fit_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vision_config has width, which transformers' CLIPVisionConfig has not"):
        CLIP({"width": 3}, {})
    with pytest.raises(ValueError, match=r"single bytes alone are 5\d\d tokens"):
        train_clip_tokenizer(CAPTIONS, tmp_path / "few", 300, 16)
    with pytest.raises(ValueError, match="no caption with any text"):
        train_clip_tokenizer(["", " "], tmp_path / "none", 600, 16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"has 5\d\d tokens, and text_config.vocab_size is 500"):
        CLIP(VISION, {**TEXT, "vocab_size": 500}, 20, tokenizer=str(tokenizer)).tokens(["red"])
    with pytest.raises(ValueError, match=r"ends captions with 1, and text_config\.eos_token_id is 7"):
        CLIP(VISION, {**TEXT, "eos_token_id": 7}, 20, tokenizer=str(tokenizer)).tokens(["red"])
    with pytest.raises(ValueError, match=r"cannot be loaded: .*Give a local folder"):
        CLIP(VISION, TEXT, 20, tokenizer=str(tmp_path / "none")).tokens(["red"])
