"""Text encoders against diffusers' Stable Diffusion 3 pipeline on tiny random weights; layout, dropout, errors."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import conf
from models.conditioner import AbsentEncoder, Conditioner
from models.given import Given
from models.text import ClipEncoder, T5Encoder
from models.text_training import train_tokenizer

CAPTIONS = ["a red circle", "", "two blue squares on the left of a very long green triangle at the bottom of it all"]
JOINT, LENGTH, LONGER = 40, 16, 24


def save_clip(folder: Path, number: str, width: int, projection: int, act: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "re", "red</w>"]
    # ids of start and end as in CLIP: the model looks for the end by its id
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocabulary, [("r", "e"), ("re", "d</w>")], model_max_length=LENGTH)
    tokenizer.save_pretrained(folder / f"tokenizer{number}")
    config = CLIPTextConfig(
        vocab_size=len(symbols),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{number}")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    """A folder with the text side of a Stable Diffusion 3 pipeline, tiny and random."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    save_clip(folder, "", width=8, projection=8, act="quick_gelu")
    save_clip(folder, "_2", width=12, projection=10, act="gelu")
    train_tokenizer([*CAPTIONS[:1], CAPTIONS[2]], folder / "tokenizer_3", vocab_size=60)
    config = T5Config(vocab_size=100, d_model=JOINT, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return folder


def clip(sd3: Path, number: str) -> ClipEncoder:
    return ClipEncoder(
        str(sd3), subfolder=f"text_encoder{number}", tokenizer_subfolder=f"tokenizer{number}", length=LENGTH
    )


def t5(sd3: Path, **options) -> T5Encoder:
    return T5Encoder(str(sd3), subfolder="text_encoder_3", tokenizer_subfolder="tokenizer_3", **options)


def three(sd3: Path, **options) -> Conditioner:
    return Conditioner([clip(sd3, ""), clip(sd3, "_2"), t5(sd3, length=LONGER)], context_dim=JOINT, **options)


def pipeline(sd3: Path, with_t5: bool = True):
    from diffusers import StableDiffusion3Pipeline
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    class Transformer:
        """The two settings of a transformer that prompts are encoded with."""

        class config:
            joint_attention_dim, sample_size, patch_size = JOINT, 8, 2

    made = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(sd3 / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(sd3 / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(sd3 / "text_encoder_2"),
        tokenizer_2=AutoTokenizer.from_pretrained(sd3 / "tokenizer_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(sd3 / "text_encoder_3") if with_t5 else None,
        tokenizer_3=AutoTokenizer.from_pretrained(sd3 / "tokenizer_3") if with_t5 else None,
    )
    made.transformer = Transformer()
    return made


def encode_prompt(sd3: Path, with_t5: bool = True) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return pipeline(sd3, with_t5).encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), max_sequence_length=LONGER
        )


def test_three_encoders_give_what_diffusers_pipeline_gives(sd3: Path):
    context, _, pooled, _ = encode_prompt(sd3)
    conditioner = three(sd3)
    ours = conditioner(Given(CAPTIONS))
    torch.testing.assert_close(ours["context"], context, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-5, atol=1e-6)
    assert context.shape[1:] == (conditioner.context_length, conditioner.context_dim) == (LENGTH + LONGER, JOINT)
    assert pooled.shape[1] == conditioner.pooled_dim == 18 and conditioner.encoders == 3


def test_an_absent_t5_is_zeros_as_in_diffusers(sd3: Path):
    context, _, pooled, _ = encode_prompt(sd3, with_t5=False)
    absent = Conditioner([clip(sd3, ""), clip(sd3, "_2"), AbsentEncoder(LONGER, JOINT)])
    ours = absent(Given(CAPTIONS))
    torch.testing.assert_close(ours["context"], context, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-5, atol=1e-6)


def test_empty_captions_for_dropped_encoders_give_diffusers_negative_prompt(sd3: Path):
    _, negative, _, negative_pooled = encode_prompt(sd3)
    ours = three(sd3, dropped="empty")(Given(CAPTIONS), torch.zeros(3, 3, dtype=torch.bool))
    torch.testing.assert_close(ours["context"], negative.expand_as(ours["context"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["pooled"], negative_pooled.expand_as(ours["pooled"]), rtol=1e-5, atol=1e-6)


def test_a_dropped_encoder_is_zero_in_its_own_place_and_nowhere_else(sd3: Path):
    conditioner = three(sd3)
    whole = conditioner(Given(CAPTIONS))
    places = [  # (positions, features, pooled features) of each encoder
        (slice(0, LENGTH), slice(0, 8), slice(0, 8)),
        (slice(0, LENGTH), slice(8, 20), slice(8, 18)),
        (slice(LENGTH, None), slice(None), slice(0, 0)),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        keep = torch.rand(3, 3, generator=generator) < 0.5
        expected = {name: value.clone() for name, value in whole.items()}
        for sample in range(3):
            for encoder, (positions, features, of_pooled) in enumerate(places):
                if not keep[sample, encoder]:
                    expected["context"][sample, positions, features] = 0
                    expected["pooled"][sample, of_pooled] = 0
        actual = conditioner(Given(CAPTIONS), keep)
        torch.testing.assert_close(actual["context"], expected["context"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(actual["pooled"], expected["pooled"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropped", ["zeros", "empty"])
def test_outputs_that_are_kept_give_the_same_conditions_without_encoders(sd3: Path, dropped):
    conditioner = three(sd3, dropped=dropped)
    encoders = dict(enumerate(conditioner.encoder_modules))
    nulls = {i: tuple(output[0] for output in encoder([""])) for i, encoder in encoders.items()}
    bare = conditioner.without_weights(nulls)
    assert not list(bare.parameters()) and bare.context_length == conditioner.context_length
    encoded = {i: encoder(CAPTIONS) for i, encoder in encoders.items()}
    for seed in range(4):
        keep = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        expected = conditioner(Given(CAPTIONS), keep)
        for one in (conditioner, bare):
            actual = one(Given(CAPTIONS, encoded=encoded), keep)
            torch.testing.assert_close(actual["context"], expected["context"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(actual["pooled"], expected["pooled"], rtol=1e-5, atol=1e-6)


def test_a_text_encoders_fingerprint_tells_weights_settings_and_vocabulary_apart(sd3: Path, tmp_path: Path):
    assert t5(sd3).fingerprint() == t5(sd3).fingerprint()
    changed = t5(sd3)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    prints = {changed.fingerprint(), t5(sd3).fingerprint(), t5(sd3, length=5).fingerprint()}
    prints |= {t5(sd3, masked=True).fingerprint(), t5(sd3, pooled=True).fingerprint()}
    train_tokenizer(["other words altogether"], tmp_path / "other", vocab_size=40)
    prints.add(T5Encoder(str(sd3), "text_encoder_3", tokenizer=str(tmp_path / "other")).fingerprint())
    assert len(prints) == 6


def test_all_encoders_dropped_gives_zeros_and_still_calls_every_encoder(sd3: Path):
    conditioner = three(sd3)
    called = []
    for i, encoder in enumerate(conditioner.encoder_modules):
        encoder.register_forward_hook(lambda *_, i=i: called.append(i))
    nothing = conditioner(Given(CAPTIONS), torch.zeros(3, 3, dtype=torch.bool))
    assert not nothing["context"].any() and not nothing["pooled"].any()
    assert called == [0, 1, 2]  # a sharded encoder waits for all ranks


def test_masked_t5_ignores_padding_and_pools_over_the_captions_tokens(sd3: Path):
    conditioner = Conditioner([t5(sd3, length=LONGER, masked=True, pooled=True)])
    longer = Conditioner([t5(sd3, length=2 * LONGER, masked=True, pooled=True)])
    ours, same = conditioner(Given(CAPTIONS[:2])), longer(Given(CAPTIONS[:2]))
    torch.testing.assert_close(ours["context"], same["context"][:, :LONGER], rtol=1e-5, atol=1e-6)
    assert not same["context"][:, LONGER:].any()
    torch.testing.assert_close(ours["pooled"], same["pooled"], rtol=1e-5, atol=1e-6)
    encoder = conditioner.encoder_modules[0]
    count = len(encoder.tokenizer(CAPTIONS[0]).input_ids)
    torch.testing.assert_close(ours["pooled"][0], ours["context"][0, :count].mean(0))
    assert conditioner.pooled_dim == conditioner.context_dim == JOINT


def test_encoders_are_frozen_and_stay_in_evaluation_mode(sd3: Path):
    conditioner = three(sd3)
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert not any(module.training for module in conditioner.train().modules())
    assert not conditioner(Given(CAPTIONS))["context"].requires_grad


def test_bfloat16_encoders_give_float32_conditions(sd3: Path):
    half = Conditioner([t5(sd3, length=LONGER, dtype="bfloat16")])
    assert next(half.parameters()).dtype == torch.bfloat16
    close, exact = half(Given(CAPTIONS))["context"], Conditioner([t5(sd3, length=LONGER)])(Given(CAPTIONS))
    assert close.dtype == torch.float32
    assert (close - exact["context"]).norm() / exact["context"].norm() < 0.03


def test_configs_build(sd3: Path):
    with initialize_config_dir(str(Path(conf.__file__).parent), version_base=None):
        config = compose(overrides=["+conditioner=sd3", f"conditioner.encoders.0.model={json.dumps(str(sd3))}"])
        nothing = instantiate(compose(overrides=["+conditioner=none"]).conditioner)
    config.conditioner.context_dim = JOINT
    for encoder in config.conditioner.encoders[:2]:
        encoder.length = LENGTH
    conditioner = instantiate(config.conditioner, _convert_="all")
    assert conditioner.encoders == 3 and conditioner.context_length == LENGTH + 77
    conditions = nothing(Given(["a", "b"]))
    assert conditions["context"].shape == (2, 1, 64) and conditions["pooled"].shape == (2, 64)


def test_what_cannot_be_loaded_or_laid_out_is_refused_by_name(sd3: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere/text_encoder"):
        ClipEncoder(
            str(tmp_path / "nowhere"), subfolder="text_encoder", tokenizer=str(sd3), tokenizer_subfolder="tokenizer"
        )
    with pytest.raises(ValueError, match=f"up to {JOINT} features"):
        Conditioner([t5(sd3)], context_dim=8)
    short = clip(sd3, "_2")
    short.length = 8
    with pytest.raises(ValueError, match="lengths 16 and 8"):
        Conditioner([clip(sd3, ""), short])


def test_pickled_weights_are_refused(sd3: Path, tmp_path: Path):
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(sd3 / "text_encoder_3")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded: Error no file named model\.safetensors"):
        T5Encoder(str(tmp_path), tokenizer=str(sd3), tokenizer_subfolder="tokenizer_3")


def test_loading_shows_no_bar_and_leaves_transformers_as_it_was(sd3: Path, capsys):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers import T5EncoderModel
    from transformers.utils import logging

    t5(sd3)
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    T5EncoderModel.from_pretrained(sd3 / "text_encoder_3")
    assert "Loading weights" in capsys.readouterr().err, "what others load shows its bar"
