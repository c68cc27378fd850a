"""The tokenizer and T5 trained from captions load like published ones, and learn what the captions have in common."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoTokenizer, T5EncoderModel

import conf
from models.given import Given
from models.text_training import CaptionConditioner, cut_spans, train_t5, train_text_encoder, train_tokenizer

CAPTIONS = [
    f"a {colour} {shape} {place}"
    for colour, shape, place in itertools.product(
        ["red", "green", "blue", "yellow"],
        ["circle", "square", "cross"],
        ["on the left", "at the top", "in the middle"],
    )
]
TINY = {"vocab_size": 80, "width": 32, "layers": 1, "heads": 2, "steps": 3}


def test_token_ids_are_sentencepieces_own(tmp_path: Path):
    train_tokenizer(CAPTIONS, tmp_path, vocab_size=80)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for caption in [*CAPTIONS, "", "never seen: ünïcode"]:
        assert tokenizer(caption).input_ids == [*model.encode(caption), model.eos_id()]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    sentinels = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_15>"])
    assert sorted(sentinels) == [len(tokenizer) - 16, len(tokenizer) - 1] and min(sentinels) >= model.get_piece_size()


def test_words_of_a_small_grammar_are_whole_pieces(tmp_path: Path):
    train_tokenizer(CAPTIONS, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a red circle on the left") == ["▁a", "▁red", "▁circle", "▁on", "▁the", "▁left"]


def test_cut_spans_can_be_put_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    sentinels = [100, 101, 102, 103]
    shares = []
    for length in [1, 2, 3, 5, 8, 13, 40] * 30:
        ids = list(range(10, 10 + length))
        source, target = cut_spans(ids, sentinels, rng)
        assert source[-1] == target[-1] == 1
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        assert list(spans) == sentinels[: len(spans)] and all(spans.values())
        assert not any(a in sentinels and b in sentinels for a, b in itertools.pairwise(source))
        restored = [t for token in source[:-1] for t in spans.get(token, [token])]
        assert restored == ids
        shares.append(sum(map(len, spans.values())) / length)
    assert np.mean(shares[6::7]) == pytest.approx(0.3)


def test_the_encoder_is_deterministic_and_independent_of_the_order_of_captions(tmp_path: Path):
    train_text_encoder(CAPTIONS, tmp_path / "one", **TINY)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train_text_encoder(reversed(CAPTIONS + CAPTIONS), tmp_path / "two", **TINY)
    assert torch.equal(before, torch.get_rng_state())
    one, two = (T5EncoderModel.from_pretrained(tmp_path / name).state_dict() for name in ["one", "two"])
    assert all(torch.equal(one[name], two[name]) for name in one)
    train_text_encoder(CAPTIONS, tmp_path / "three", **TINY, seed=1)
    assert not torch.equal(one["shared.weight"], T5EncoderModel.from_pretrained(tmp_path / "three").shared.weight)
    assert not list(tmp_path.glob("*.partial"))


def test_training_learns_what_captions_have_in_common(tmp_path: Path):
    train_tokenizer(CAPTIONS, tmp_path)
    losses = train_t5(CAPTIONS, tmp_path, width=64, layers=1, steps=120)
    assert np.mean(losses[:3]) > 3 and np.mean(losses[-10:]) < 1.3


def test_a_conditioner_trains_its_encoder_once_and_then_loads_it(tmp_path: Path):
    asked = []

    def captions():
        asked.append(True)
        return CAPTIONS

    with initialize_config_dir(str(Path(conf.__file__).parent), version_base=None):
        overrides = [f"conditioner.{key}={value}" for key, value in TINY.items()]
        config = compose(overrides=["+conditioner=t5_local", f"+runs={tmp_path}", "+name=run", *overrides])
    with pytest.raises(ValueError, match="no captions to train"):
        CaptionConditioner(config.conditioner.folder)
    first = instantiate(config.conditioner, captions=captions)
    second = instantiate(config.conditioner, captions=captions)
    assert isinstance(first, CaptionConditioner) and len(asked) == 1
    a, b = (made(Given(CAPTIONS[:4])) for made in (first, second))
    assert torch.equal(a["context"], b["context"]) and torch.equal(a["pooled"], b["pooled"])
    assert a["context"].shape == (4, 32, 32) and a["pooled"].shape == (4, 32)
    assert len({tuple(row.tolist()) for row in a["pooled"]}) == 4
    with pytest.raises(ValueError, match="of width 32, not 64"):
        CaptionConditioner(config.conditioner.folder, width=64)


def test_captions_without_text_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no caption with any text"):
        train_text_encoder(["", "  "], tmp_path / "encoder")


def test_too_few_pieces_for_the_captions_characters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^vocab_size=4: sentencepiece .* 4 vs 15"):
        train_tokenizer(["a red dog", "a blue cat"], tmp_path, vocab_size=4)
