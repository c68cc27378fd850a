"""Models of transformers' real classes, tiny and of random weights, in folders, for tests without a network."""

from pathlib import Path

import torch

from models.text_training import train_tokenizer

SIDE = 24
LENGTH = 12
_TEXT = ["a red circle", "two blue squares on the left of a green triangle", "a photo of a cat", "describe the picture"]
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_WORDS = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with embeddings of 10 numbers."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "re", "red</w>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    CLIPTokenizer(vocabulary, [("r", "e"), ("re", "d</w>")], model_max_length=LENGTH).save_pretrained(folder)
    words = {"vocab_size": len(symbols), "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config={**_WORDS, **words}, vision_config=_VISION, projection_dim=10))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A SigLIP with embeddings of 16 numbers."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    train_tokenizer(_TEXT, folder, vocab_size=60)
    words = {**_WORDS, "hidden_size": 16, "vocab_size": 100, "max_position_embeddings": LENGTH}
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(text_config=words, vision_config=_VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A BLIP, which captions a picture with or without words to go on from."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *sorted({w for t in _TEXT for w in t.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]"]})
    text = {
        **_WORDS,
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 40,
        "bos_token_id": vocabulary["[DEC]"],
        "eos_token_id": vocabulary["[SEP]"],
        "sep_token_id": vocabulary["[SEP]"],
        "pad_token_id": vocabulary["[PAD]"],
        "initializer_range": 1.0,
    }
    torch.manual_seed(2)
    vision = {**_VISION, "initializer_range": 0.5}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)
    processor.save_pretrained(folder)
    return folder


def save_llava(folder: Path, tiled: bool = False) -> Path:
    """A LLaVA, which answers in a chat; `tiled`: a LLaVA-NeXT, which also cuts pictures into as many tiles as their
    shapes ask for, so that requests have unequal lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [*specials, "USER:", "ASSISTANT:", *sorted({w for t in _TEXT for w in t.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        **_WORDS,
        "model_type": "llama",
        "vocab_size": len(words),
        "num_key_value_heads": 2,
        "initializer_range": 1.0,
    }
    vision = {**_VISION, "model_type": "clip_vision_model", "initializer_range": 0.5}
    torch.manual_seed(5)
    ids = {"image_token_id": vocabulary["<image>"], "pad_token_id": 0}
    parts = {"text_config": {**text, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": vision, **ids}
    grid = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]}
    if tiled:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, **grid))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**parts))
    model.lm_head.weight.data[: len(specials)] = 0  # words are likelier than special tokens
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    template = (
        "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    images = LlavaNextImageProcessorPil(**size, **grid) if tiled else CLIPImageProcessorPil(**size)
    processor = (LlavaNextProcessor if tiled else LlavaProcessor)(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def save_vit_gpt2(folder: Path) -> Path:
    """A ViT and a GPT-2 that looks at it, without a processor for both."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        PreTrainedTokenizerFast,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({w for t in _TEXT for w in t.split()})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(folder)
    text = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2,
        initializer_range=1.0,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_VISION), text)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(4)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def drop_weight(folder: Path, name: str) -> None:
    """Take one tensor out of a folder's weights."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
