"""Parts of transformers' models from a local folder or the Hugging Face hub; weights in safetensors only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from models.pipeline_folder import TRANSFORMERS_STEM
from models.tensor_files import variant_of

Dtype = Literal["float32", "bfloat16", "float16"]


def load_weights(kind: Any, model: str | Path, subfolder: str, dtype: Dtype, **options: Any) -> Any:
    """A model with its weights, of one of transformers' classes.

    Args:
        kind: the class.
        model: folder, or name on the hub.
        subfolder: of the weights, "" for none.
        dtype: of the weights.

    Raises:
        ValueError: there are no such weights, or not all of them: transformers would leave the others at random.
    """
    # Safetensors only: weights in pickles could run code.
    options |= {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    options["variant"] = variant_of(Path(model, subfolder), TRANSFORMERS_STEM)  # of a local folder
    loaded, told = load_part(kind.from_pretrained, model, subfolder, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{_place(model, subfolder)} lacks {len(missing)} of the weights of {type(loaded).__name__}, such as"
            f" {missing[0]}"
        )
    return loaded


def device_of(model: Any) -> torch.device:
    """Where a model is, whose weights may be buffers."""
    return next(chain(model.parameters(), model.buffers())).device


def load_part(load: Callable[..., Any], model: str | Path, subfolder: str = "", **options: Any) -> Any:
    """What one of transformers' `from_pretrained` makes of a folder or name: a tokenizer, a processor, a configuration.

    Raises:
        ValueError: there is nothing of the kind.
    """
    try:
        with without_bars():
            return load(model, subfolder=subfolder, **options)
    except (OSError, ImportError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]  # a list of all model types may follow
        raise ValueError(
            f"{_place(model, subfolder)} cannot be loaded: {reason} (Give a local folder, or a name on the Hugging Face"
            " hub that is reachable or already downloaded.)"
        ) from error


def _place(model: str | Path, subfolder: str) -> str:
    return f"{model}/{subfolder}" if subfolder else str(model)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows no progress over tensors within; downloads, which take their time, still show theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # the hub's as well
    enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
