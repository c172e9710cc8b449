"""fairseq's own command lines with the architectures of this package: stock tools, stock flags, stock data-bin."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fwp_lightning.errors import UserError, sentence_of

# tool -> what it does; all but the last two are fairseq's
TOOLS = {
    "preprocess": "make a data-bin folder of parallel text",
    "train": "train a model, resuming from its last checkpoint",
    "generate": "translate a data-bin split and score it",
    "interactive": "translate lines from standard input",
    "validate": "compute the loss on a split",
    "score": "score a translation",
    "average": "average the parameters of checkpoints",
    "convert": "turn a checkpoint of Lightning into one of fairseq, or back",
}
TAKE_USER_DIR = ("preprocess", "train", "generate", "interactive", "validate")
# fairseq imports the folder under its own name
USER_DIR = Path(__file__).parent / "user_dir" / "fwp_fairseq"
Preparation = Callable[[], None]


def run(tool: str, arguments: Sequence[str], prepare: Sequence[Preparation] = ()) -> int:
    """Run one of ``TOOLS`` in this process; raise ``UserError`` for what the user can put right.

    ``prepare`` imports the user's files here, and again in each process that fairseq starts.
    """
    from fwp_lightning.translation.compatibility import install

    install()
    for step in prepare:
        step()
    if tool in ("average", "convert"):
        from fwp_lightning.translation.checkpoints import average_command, convert_command

        return {"average": average_command, "convert": convert_command}[tool](arguments)
    architectures = importlib.import_module("fwp_lightning.translation.architectures")
    _spawn_patched_processes(prepare)
    asks_for_help = {"-h", "--help"} & set(arguments)
    if tool == "train" and not asks_for_help and not any(word.split("=")[0] in ("-a", "--arch") for word in arguments):
        known = ", ".join(architectures.register_architectures())
        raise UserError(f"fairseq-train: --arch is missing; this package adds {known}.")
    given = any(argument.split("=")[0] == "--user-dir" for argument in arguments)
    extra = ["--user-dir", str(USER_DIR)] if tool in TAKE_USER_DIR and not given else []
    sys.argv = [f"fwp fairseq-{tool}", *arguments, *extra]
    try:
        importlib.import_module(f"fairseq_cli.{tool}").cli_main()
    except (ValueError, OSError) as error:
        raise UserError(f"fairseq-{tool}: {sentence_of(error)}") from error
    except Exception as error:
        if sentence := _known(error):
            raise UserError(f"fairseq-{tool}: {sentence}") from error
        raise
    return 0


def _known(error: Exception) -> str | None:
    """Return what is wrong where fairseq raises something general for a user's mistake."""
    text = " ".join(str(error).split())
    if type(error) is Exception:
        # so general a type is fairseq's own way to talk to its user
        reason = f" {sentence_of(error.__context__)[:400]}" if error.__context__ else ""
        return text + (reason if "architectures match" in text else "")
    if isinstance(error, AssertionError) and "same number of examples" in text:
        return f"{text}: line by line they must be translations of each other; make the data-bin folder anew."
    if isinstance(error, pickle.UnpicklingError):
        return "the checkpoint is damaged, or holds more than tensors and plain values, and is not read."
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        return f"the checkpoint is of another architecture or dictionary: {text[:400]}"
    return None


def _spawn_patched_processes(prepare: Sequence[Preparation]) -> None:
    """Let the processes that fairseq starts, one a GPU, patch fairseq before they unpickle what they have to do."""
    utils: Any = importlib.import_module("fairseq.distributed.utils")
    utils.torch.__dict__["multiprocessing"] = SimpleNamespace(spawn=functools.partial(_spawn, tuple(prepare)))


def _spawn(prepare: tuple[Preparation, ...], fn: Callable[..., None], args: tuple[Any, ...], **options: Any) -> Any:
    from torch.multiprocessing.spawn import spawn

    return spawn(_work, args=(prepare, pickle.dumps((fn, args))), **options)


def _work(index: int, prepare: tuple[Preparation, ...], task: bytes) -> None:
    from fwp_lightning.translation.compatibility import install

    install()
    for step in prepare:
        step()
    importlib.import_module("fwp_lightning.translation.architectures")
    fn, args = pickle.loads(task)
    fn(index, *args)
