"""The cache: folders that are made once, whole or not at all, by whichever process is first."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from data.store import StoreError


def make_once(root: Path, name: str, mark: str, write: Callable[[Path], None]) -> Path:
    """Make a folder of the cache, unless it is there, and return its path. Any number of processes may do so at once.

    Args:
        root: of the cache.
        name: of the folder, below the root; holds a hash of all that its content follows from.
        mark: the file in it that `write` writes last.
        write: fills an empty folder.

    Raises:
        StoreError: nothing can be written there, the disk is full ...; or as `write` raises it.
    """
    folder = root / name
    if (folder / mark).exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first, with the same content
            if not (folder / mark).exists():
                raise
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"cannot write to {folder.parent}: {reason} (data.cache_folder={root})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
