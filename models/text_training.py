"""A small tokenizer and T5 trained from a data set's own captions, for where no pretrained text encoder is at hand; and
a CLIP's tokenizer.

A sentencepiece model is fitted to the captions, then a T5 learns to restore spans that were cut out of them (span
corruption, arXiv 1910.10683, section 3.1.4). Its encoder is kept. The folder loads like any published T5:
`AutoTokenizer.from_pretrained(folder)` and `T5EncoderModel.from_pretrained(folder)`.
"""

import io
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from models.conditioner import Conditioner, ConditionMap, SizeIds
from models.hub import without_bars
from models.text import T5Encoder

# Sentinels <extra_id_0>, ... that mark cut-out spans: the most spans of one caption.
_SENTINELS = 16
_CUT_SHARE, _SPAN_LENGTH = 0.3, 2.0
_PAD, _EOS, _UNK = 0, 1, 2
_PRIVATE = 0xE000  # where Unicode's private use begins
_IGNORE = -100  # torch's label for positions without loss


class CaptionConditioner(Conditioner):
    """A conditioner with one T5 of its own, trained from captions where `folder` does not hold it yet.

    Args:
        folder: of the encoder.
        length: tokens of a caption; longer captions are cut.
        vocab_size: pieces of the tokenizer at most; few captions have fewer.
        width: features of a token and of the pooled vector.
        layers: of encoder and decoder each.
        heads: of attention.
        steps: of training, with 32 captions each.
        seed: of training.
        captions: gives the captions to train from; called only where there is something to train.
        sizes, maps: as of any conditioner.

    Raises:
        ValueError: `folder` holds no encoder, and there are no captions to train it from; or one of another width.
    """

    def __init__(
        self,
        folder: str,
        length: PositiveInt = 32,
        vocab_size: PositiveInt = 512,
        width: PositiveInt = 128,
        layers: PositiveInt = 2,
        heads: PositiveInt = 4,
        steps: PositiveInt = 400,
        seed: int = 0,
        captions: Callable[[], Iterable[str]] | None = None,
        sizes: SizeIds | None = None,
        maps: list[ConditionMap] | None = None,
    ):
        if not Path(folder, "config.json").exists():
            if captions is None:
                raise ValueError(f"{folder!r} holds no text encoder, and there are no captions to train one from")
            train_text_encoder(captions(), Path(folder), vocab_size, width, layers, heads, steps, seed)
        super().__init__([T5Encoder(folder, length=length, masked=True, pooled=True)], sizes=sizes, maps=maps)
        if self.context_dim != width:
            raise ValueError(
                f"{folder!r} holds a text encoder of width {self.context_dim}, not {width}: take that width, or another"
                " folder to train one in"
            )


def train_text_encoder(
    captions: Iterable[str],
    folder: Path,
    vocab_size: int = 512,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    steps: int = 400,
    seed: int = 0,
) -> None:
    """Train a tokenizer and a T5 encoder into `folder`, which appears whole or not at all.

    The same captions (in any order, repeated or not) and seed give the same folder on the same machine.

    Raises:
        ValueError: no caption has any text.
    """
    texts = sorted({caption.strip() for caption in captions} - {""})
    if not texts:
        raise ValueError("there is no caption with any text to train a text encoder from")
    with _whole(folder, "config.json") as partial:
        train_tokenizer(texts, partial, vocab_size)
        train_t5(texts, partial, width, layers, heads, steps, seed=seed)


@contextmanager
def _whole(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write in, which becomes `folder`, unless another run was faster: `last` tells that it is there."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.rename(folder)
    except OSError:
        if not (folder / last).exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def train_tokenizer(captions: Sequence[str], folder: Path, vocab_size: int = 512) -> None:
    """Fit a sentencepiece unigram model and write it as a T5 tokenizer: `spiece.model`, `tokenizer_config.json`.

    Args:
        vocab_size: pieces at most, with <pad>, </s> and <unk>, without the sentinels.

    Raises:
        ValueError: sentencepiece cannot fit that few pieces to the captions' characters.
    """
    import sentencepiece

    # Each word joins the captions as "word word", once before a space and once at an end: sentencepiece takes only what
    # is followed by different things as a candidate piece, and in a small grammar many words never are.
    words = sorted({f"{word} {word}" for caption in captions for word in caption.split()})
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(captions, words),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # few captions may not have that many pieces
            model_type="unigram",
            character_coverage=1.0,
            pad_id=_PAD,
            eos_id=_EOS,
            unk_id=_UNK,
            bos_id=-1,
            num_threads=1,  # the result depends on their number
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # behind the place in its source and the condition there
        raise ValueError(f"vocab_size={vocab_size}: sentencepiece refuses it for these captions: {reason}") from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    # transformers reads spiece.model from a folder only; given as an argument it is silently ignored.
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": _SENTINELS, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def train_clip_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int, length: int) -> None:
    """Train a CLIP tokenizer, byte pairs of lower-case words, into `folder`, which appears whole or not at all.

    Any text can be told in its tokens, whatever the captions. The same captions (in any order, repeated or not) give
    the same tokenizer. Captions begin with token 0, and end with token 1.

    Args:
        vocab_size: tokens at most, 514 or more.
        length: tokens of a caption.

    Raises:
        ValueError: no caption has any text, or the tokens are too few.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    texts = sorted({caption.strip() for caption in captions} - {""})
    if not texts:
        raise ValueError("there is no caption with any text to train a tokenizer from")
    empty = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [], model_max_length=length)
    backend = empty.backend_tokenizer
    words = [
        word[:-1] + _last(word[-1])
        for text in texts
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    ]
    # CLIP's vocabulary tells a word's last byte from others by "</w>" behind it. The trainer would number these tokens
    # by chance; a letter of its own stands for each meanwhile, in a trainer that has nothing else to tell apart.
    letters = sorted(ByteLevel.alphabet())
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[empty.bos_token, empty.eos_token],
        initial_alphabet=[*letters, *map(_last, letters)],
        show_progress=False,
    )
    trained.train_from_iterator(words, trainer)
    told = json.loads(trained.to_str())["model"]
    if len(told["vocab"]) > vocab_size:
        raise ValueError(f"text_config.vocab_size={vocab_size}: single bytes alone are {len(told['vocab'])} tokens")
    vocabulary = {_with_end(token): number for token, number in told["vocab"].items()}
    merges: Any = [(_with_end(one), _with_end(other)) for one, other in told["merges"]]
    with _whole(folder, "tokenizer_config.json") as partial:
        CLIPTokenizer(vocabulary, merges, model_max_length=length).save_pretrained(partial)


def _last(letter: str) -> str:
    """What stands for a letter at a word's end: one of Unicode's private use."""
    return chr(_PRIVATE + ord(letter))


def _with_end(token: str) -> str:
    last = ord(token[-1]) - _PRIVATE
    return f"{token[:-1]}{chr(last)}</w>" if last > 0 else token


def train_t5(
    captions: Sequence[str],
    folder: Path,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    steps: int = 400,
    batch: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train a T5 by span corruption with the tokenizer in `folder`, and write its encoder there.

    Returns:
        The loss of each step, in nats per cut-out token.
    """
    from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    sentinels = [vocabulary[f"<extra_id_{i}>"] for i in range(_SENTINELS)]
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    config.decoder_start_token_id = _PAD
    ids = [tokenizer(caption, add_special_tokens=False).input_ids for caption in captions]
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        # Up over a twentieth of the steps, then down to zero.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (steps / 20), 1) * (1 - step / steps)
        )
        losses = []
        for _ in range(steps):
            corrupted = [cut_spans(ids[i], sentinels, rng) for i in rng.integers(len(ids), size=batch)]
            inputs = _padded([source for source, _ in corrupted], _PAD)
            labels = _padded([target for _, target in corrupted], _IGNORE)
            loss = model(input_ids=inputs, attention_mask=(inputs != _PAD).long(), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        encoder = T5EncoderModel(config)
        trained = model.state_dict()
        encoder.load_state_dict({name: trained[name] for name in encoder.state_dict()})
    with without_bars():
        encoder.save_pretrained(folder)
    return losses


def cut_spans(ids: Sequence[int], sentinels: Sequence[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Cut random spans out of a caption: (caption with a sentinel for each span, each sentinel followed by its span).

    About 30 % of the tokens go, in spans of two on average; both results end with </s>.

    Args:
        ids: tokens without </s>; at least one.
        sentinels: tokens that mark spans, in order.
    """
    count = max(1, round(len(ids) * _CUT_SHARE))
    # Spans cannot be more than the gaps that part them from one another.
    spans = min(max(1, round(count / _SPAN_LENGTH)), len(ids) - count + 1, len(sentinels))
    cut = _composition(count, spans, 1, rng)
    left = _composition(len(ids) - count - (spans - 1), spans + 1, 0, rng)
    source: list[int] = []
    target: list[int] = []
    at = 0
    for i in range(spans):
        gap = left[i] + (i > 0)
        source += [*ids[at : at + gap], sentinels[i]]
        target += [sentinels[i], *ids[at + gap : at + gap + cut[i]]]
        at += gap + cut[i]
    return [*source, *ids[at:], _EOS], [*target, _EOS]


def _composition(total: int, parts: int, least: int, rng: np.random.Generator) -> list[int]:
    """`total` as an ordered sum of `parts` numbers of at least `least`, all equally likely."""
    free = total - parts * least
    bars = np.sort(rng.choice(free + parts - 1, size=parts - 1, replace=False))
    edges = np.concatenate([[-1], bars, [free + parts - 1]])
    return [int(size) - 1 + least for size in np.diff(edges)]


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
