"""Checkpoints as files: what they hold is read here alone, and no code in one is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fwp_lightning.errors import UserError, sentence_of


def read_plain(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Return what a checkpoint holds, tensors and plain values, on a device; meta: shapes alone.

    Raises:
        UserError: what is wrong with the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        said = "it is damaged, or holds more than tensors and plain values, and is not read"
        raise UserError(f"{path}: {said}.") from error
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"{path}: it cannot be read: {sentence_of(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: it holds no state of a training.")
    return content
