"""Checkpoints: from Lightning to fairseq and back, and averaged as the WMT recipes do (the paper does not)."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwp_lightning.checkpoint_files import read_plain
from fwp_lightning.errors import UserError

EPOCH = re.compile(r"checkpoint(\d+)\.pt")
MODEL = "model."
"""What the names of a model's parameters begin with in a Lightning checkpoint."""
UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def average_command(arguments: Sequence[str]) -> int:
    """Run `fairseq-average`."""
    parser = argparse.ArgumentParser(
        prog="fwp fairseq-average",
        description="Average the parameters of checkpoints of one training.",
        epilog="The paper's Table 1 is without averaging.",
        allow_abbrev=False,
    )
    parser.add_argument("--inputs", nargs="+", required=True, metavar="PATH", help="checkpoints, or one folder of them")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the averaged checkpoint goes")
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--num-epoch-checkpoints", type=int, metavar="N", help="of a folder, the last N epochs'")
    last.add_argument(
        "--num-update-checkpoints", type=int, metavar="N", help="of a folder, the last N saved by updates"
    )
    options = parser.parse_args(arguments)
    chosen = [Path(name) for name in options.inputs]
    if options.num_epoch_checkpoints or options.num_update_checkpoints:
        pattern = EPOCH if options.num_epoch_checkpoints else UPDATE
        chosen = last_checkpoints(
            chosen[0], options.num_epoch_checkpoints or options.num_update_checkpoints, pattern=pattern
        )
    torch.save(average(chosen), options.output)
    print(f"{options.output}: the mean of {', '.join(str(path) for path in chosen)}")
    return 0


def convert_command(arguments: Sequence[str]) -> int:
    """Run `fairseq-convert`."""
    parser = argparse.ArgumentParser(
        prog="fwp fairseq-convert",
        description="Make a fairseq checkpoint of a translation run's Lightning checkpoint, or the other way.",
        epilog="fairseq's own tools read the former; fwp test, with --ckpt_path, and further training the latter.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="a checkpoint of Lightning or of fairseq")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the other one goes")
    options = parser.parse_args(arguments)
    state = read_plain(Path(options.input))
    if "state_dict" in state and "translation" in state:
        kept, found = state["translation"], "a Lightning"
        weights = kept["best"] or _without_prefix(state["state_dict"])
        converted = fairseq_checkpoint(weights, kept["arguments"], int(state["state_dict"]["_steps"]))
    elif "model" in state:
        converted, found = lightning_checkpoint(state), "a fairseq"
    else:
        raise UserError(f"{options.input} is no checkpoint of a translation model, neither Lightning's nor fairseq's.")
    torch.save(converted, options.output)
    print(f"{options.output}: the model of {options.input}, {found} checkpoint")
    return 0


def fairseq_checkpoint(weights: Mapping[str, Tensor], arguments: Mapping[str, Any], n_updates: int) -> dict[str, Any]:
    """Return what fairseq's tools read: the weights, and the arguments that build their model; no optimiser."""
    names = {"criterion_name": "LabelSmoothedCrossEntropyCriterion", "optimizer_name": "FairseqAdam"}
    return {
        "args": argparse.Namespace(**arguments, task="translation"),
        "model": dict(weights),
        "optimizer_history": [{**names, "lr_scheduler_state": {}, "num_updates": n_updates}],
        "extra_state": {},
    }


def lightning_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Lightning reads: the weights of a fairseq checkpoint, and how many updates made them."""
    import lightning as L

    weights = {f"{MODEL}{name}": value for name, value in state["model"].items()}
    n_updates = state["optimizer_history"][-1]["num_updates"]
    counts = {"_steps": torch.tensor(n_updates), "_tokens": torch.tensor(0)}
    return {
        "state_dict": {**weights, **counts},
        "translation": {"best": None, "best_bleu": -math.inf, "arguments": {}},
        "pytorch-lightning_version": L.__version__,
        "epoch": 0,
        "global_step": n_updates,
    }


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(MODEL): value for name, value in state.items() if name.startswith(MODEL)}


def last_checkpoints(folder: Path, number: int, *, pattern: re.Pattern[str] = EPOCH) -> list[Path]:
    """Return the last ``number`` checkpoints of a folder, the newest first; too few are an error."""
    found = [(int(match[1]), path) for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))]
    if len(found) < number:
        raise UserError(f"{folder} has {len(found)} such checkpoints, not {number}; ask for fewer or train longer.")
    return [path for _, path in sorted(found, reverse=True)[:number]]


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the first checkpoint with the mean of all parameters; what is no number of the model is the first's."""
    states = [read_checkpoint(path) for path in paths]
    first = states[0]["model"]
    for path, state in zip(paths, states, strict=True):
        if state["model"].keys() != first.keys() or any(state["model"][k].shape != first[k].shape for k in first):
            raise UserError(f"{path} has other parameters than {paths[0]}; average checkpoints of one training.")
    mean = {name: _mean([state["model"][name] for state in states]) for name in first}
    return {**states[0], "model": mean}


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    # half-precision checkpoints are summed in float32
    total = torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]).mean(0)
    return total.to(values[0].dtype)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a fairseq checkpoint holds."""
    state = read_plain(path)
    if "model" not in state:
        raise UserError(f"{path} is no checkpoint of fairseq: it holds no model.")
    return state
