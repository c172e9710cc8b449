"""What fairseq 0.12.2 (June 2022) needs to run with Python 3.11, NumPy 2 and torch 2.6: four patches.

Nothing here imports fairseq before ``install`` is called, and nothing else in the package imports it without that.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fwp_lightning.errors import UserError

VERSION = "0.12.2"
OLDEST_HYDRA = (1, 3)
INSTALL = "run make setup, or pip install --no-deps -r fairseq.txt beside pip install '.[mt]'"

# parameters of an encoder layer that only the fused evaluation path reads; all copies of others
PHANTOMS = (
    "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip


def why_unavailable() -> str | None:
    """Return the sentence why fairseq cannot be used here, or None if it can; imports nothing."""
    if importlib.util.find_spec("fairseq") is None:
        return f"translation needs fairseq {VERSION}, which is not installed: {INSTALL}."
    found = importlib.metadata.version("fairseq")
    if found != VERSION:
        return (
            f"fairseq {found} is installed, but the patches that make it run here are those of {VERSION} (later code "
            f"drops the last test batch): {INSTALL}."
        )
    for name in ("hydra-core", "omegaconf", "sacrebleu", "bitarray", "regex"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"fairseq is installed, but {name}, which it needs, is not: pip install 'fwp-lightning[mt]'."
        if name == "hydra-core" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_HYDRA:
            return (
                f"hydra-core {version} breaks pytest and Lightning on Python 3.11: "
                "pip install 'hydra-core>=1.3.2,<1.4' 'omegaconf>=2.3,<2.4'."
            )
    return None


def install() -> None:
    """Make ``import fairseq`` work and be right; raise ``UserError`` where it is missing or of another version."""
    # every time: a caller's catch_warnings forgets filters when it ends
    _quieten()
    _patch()


@functools.cache
def _patch() -> None:
    reason = why_unavailable()
    if reason:
        raise UserError(reason)
    _allow_dataclass_defaults()
    importlib.import_module("fairseq")
    _restore_numpy_names()
    _load_checkpoints()
    _drop_encoder_fast_path()


def _allow_dataclass_defaults() -> None:
    """Patch 1: fairseq writes dataclass instances as field defaults, which Python 3.11 refuses if they are unhashable.

    facebookresearch/fairseq issues 5012, 5457. The defaults stay instances, since fairseq's hydra set-up reads them.
    """
    original = dataclasses.dataclass
    if getattr(original, "hashes_fairseq", False):
        return

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        def make(cls: type) -> type:
            made: Any = original(cls, **options)
            if cls.__module__.split(".")[0] == "fairseq" and made.__hash__ is None:
                made.__hash__ = object.__hash__
            return made

        return make if cls is None else make(cls)

    dataclass.hashes_fairseq = True  # type: ignore[attr-defined]
    dataclasses.dataclass = dataclass


def _quieten() -> None:
    """Keep fairseq's deprecated calls to hydra and torch out of the user's sight: nobody can act on them."""
    for module in ("fairseq", "hydra"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    # fairseq's decoder gives masks of booleans and of numbers to torch's attention
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    # hydra's own are shown at the line that called it
    warnings.filterwarnings("ignore", message=r"(?s).*hydra\.cc/docs.*")
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)


class _Overlay(ModuleType):
    """A module with some names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__["_module"] = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _restore_numpy_names() -> None:
    """Patch 2: three modules use NumPy 1's np.int, np.float, np.compat and percentile(interpolation=)."""

    def percentile(*values: Any, interpolation: str = "linear", **options: Any) -> Any:
        return np.percentile(*values, **{"method": interpolation, **options})

    compat = ModuleType("numpy.compat")
    compat.long = int  # type: ignore[attr-defined]
    old = _Overlay(np, int=int, float=float, compat=compat, percentile=percentile)
    for name in ("data_utils", "language_pair_dataset", "token_block_dataset"):
        importlib.import_module(f"fairseq.data.{name}").np = old  # type: ignore[attr-defined]


def _load_checkpoints() -> None:
    """Patch 3: torch >= 2.6 loads plain tensors only; fairseq's checkpoints also hold arguments and NumPy numbers.

    Issues 5603, 5610. Those few classes are allowed, so that a checkpoint still cannot run code. What the processes of
    one training broadcast to each other, whole configurations, is their own and loaded as it is.
    """
    multiarray = importlib.import_module("numpy._core.multiarray")
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    torch.serialization.add_safe_globals(
        [argparse.Namespace, multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *kinds]
    )
    own = _Overlay(torch, load=functools.partial(torch.load, weights_only=False))
    importlib.import_module("fairseq.distributed.utils").torch = own  # type: ignore[attr-defined]


def _drop_encoder_fast_path() -> None:
    """Patch 4: 0.12.2 evaluates post-norm encoder layers with torch's fused softmax layer, whatever they hold.

    No error: a custom attention is trained and then not called (pull request 4513, taken out again after 0.12.2). The
    fused path also brings eight copied parameters a layer, which would count as the model's.
    """
    layers = importlib.import_module("fairseq.modules.transformer_layer")
    encoder_layer = layers.TransformerEncoderLayerBase
    original: Callable[..., None] = encoder_layer.__init__

    @functools.wraps(original)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self.can_use_fastpath = False
        for name in PHANTOMS:
            delattr(self, name)
            # TorchScript compiles the branch that reads them
            self.register_buffer(name, torch.empty(0), persistent=False)

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in PHANTOMS:
            state_dict.pop(prefix + name, None)
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)

    encoder_layer.__init__ = init
    encoder_layer._load_from_state_dict = load
