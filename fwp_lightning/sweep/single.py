"""`fwp fit`, `validate` and `test`: LightningCLI as it is, with tracking and checkpoints in the run's folder."""

from __future__ import annotations

import json
import os
import time
import traceback
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import ADDED, CHECKPOINT_SECONDS, Project, Run, sha256_of
from fwp_lightning.sweep.ranks import silent_recorder
from fwp_lightning.sweep.training import (
    ExactCheckpoint,
    Measurements,
    TrackingLogger,
    build_on_meta,
    divergence_of,
    first_cause,
    publish_checkpoint,
    quiet_lightning,
    ran_out_of_memory,
    random_state,
    read_weights,
    record_texts,
    set_random_state,
    steps_of,
    why_not_weights_of,
    write_checkpoint,
    write_final,
)
from fwp_lightning.tracking import Origin, RunRecorder, open_store, params_of, require_folder, tags_of

# tells the processes that Lightning starts for further devices which run they belong to
# no name of a secret: what such variables hold is masked in all that is printed
RUN_KEY = "FWP_RUN"
# names that Lightning resolves itself
LIGHTNING_CHECKPOINTS = ("best", "last", "hpc", "registry")


class StrictParser(LightningArgumentParser):
    """A parser whose options are written out; jsonargparse makes those of nested classes of its kind too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Allow no abbreviation."""
        super().__init__(*args, **{**settings, "allow_abbrev": False})


class SingleCLI(LightningCLI):
    """LightningCLI that records its run in the project's store; a run resumed with --ckpt_path stays the same run."""

    def __init__(self, arguments: list[str], project: Project, origin: Origin) -> None:
        """Parse and run."""
        self.project, self.origin = project, origin
        self.recorder: RunRecorder | None = None
        self.measurements: Measurements | None = None
        self.weights: dict[str, Tensor] | None = None
        refuse = {"exit_on_error": False}
        super().__init__(
            args=arguments,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "fwp", **refuse, **{name: dict(refuse) for name in self.subcommands()}},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments of the trainer that they do not show."""
        known = LightningCLI.subcommands()
        # no checkpoint may run code, whatever is asked for
        return {name: {*known[name], "weights_only"} for name in ("fit", "validate", "test")}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        """Return a strict parser of a command."""
        parser = StrictParser(**settings)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file in YAML")
        # base configurations of experiments have it, and it is about the keys of a sweep's runs alone
        parser.add_argument(f"--{ADDED}", type=dict, default={}, help=SUPPRESS)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; a wrong option is one sentence."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(f"{first_cause(error)}; see: fwp {args[0]} --help") from error
        self.config[args[0]].pop(ADDED)
        # Lightning reads the file next, and complains in many lines
        self.checkpoint = str(self.config[args[0]].get("ckpt_path") or "")
        if self.checkpoint and self.checkpoint not in LIGHTNING_CHECKPOINTS and ":" not in self.checkpoint:
            try:
                self.weights = read_weights(Path(self.checkpoint))
            except UserError as error:
                raise UserError(f"--ckpt_path {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that logs to the store and saves to the folder of the run."""
        config = self._get(self.config_init, "trainer", default={})
        self._check(config)
        self.recorder = self._start_recorder()
        data = json.loads(json.dumps(self.config_dump.get("data") or {}, default=str))
        self.measurements = Measurements(self.recorder, data)
        callbacks = [
            ExactCheckpoint(self.recorder, seconds=CHECKPOINT_SECONDS, stop=lambda: None),
            self.measurements,
        ]
        own = {
            "logger": TrackingLogger(self.recorder),
            "default_root_dir": str(self.recorder.folder),
            "enable_checkpointing": False,
        }
        return self._instantiate_trainer({**config, **own, **kwargs}, callbacks)

    def _check(self, config: Any) -> None:
        """Find what cannot run before a run is recorded: the checkpoint, the model, the trainer."""
        before = random_state()
        model = build_on_meta(self.model, self.datamodule)
        set_random_state(before)
        if self.weights is not None and (difference := why_not_weights_of(self.weights, model)):
            raise UserError(
                f"--ckpt_path {self.checkpoint} is of another configuration: {difference}; see config.yaml beside it."
            )
        self._instantiate_trainer({**config, "logger": False, "enable_checkpointing": False}, [])

    def _start_recorder(self) -> RunRecorder:
        subcommand = str(self.subcommand)
        self._dump_config()
        config: dict[str, Any] = json.loads(json.dumps(self.config_dump, default=str))
        checkpoint = config.pop("ckpt_path", None)
        header = _header_beside(checkpoint) if subcommand == "fit" else None
        run = Run(
            experiment=subcommand,
            row=str(config["model"]["class_path"]).rsplit(".", 1)[-1],
            point="",
            seed=int(config.get("seed_everything") or 0),
            profile="",
            protocol="",
            version=1,
            config=config,
        )
        tags = tags_of(run, self.origin)
        key = header["tags"]["run_key"] if header else sha256_of([run.run_key, time.time_ns()])[:16]
        if rank_zero_only.rank > 0:  # type: ignore[attr-defined]
            return silent_recorder(self.project, os.environ.get(RUN_KEY, key), subcommand, run.name)
        os.environ[RUN_KEY] = key
        recorder = RunRecorder(
            open_store(self.project),
            self.project,
            run_key=key,
            experiment=subcommand,
            name=run.name,
            tags={**tags, "run_key": key},
        )
        (recorder.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        texts = {
            "config.yaml": yaml.safe_dump(config, sort_keys=False),
            "environment.json": self.origin.environment,
            "git.diff": self.origin.git_diff,
        }
        recorder.start(params_of(config), {name: text for name, text in texts.items() if text})
        return recorder


def _header_beside(checkpoint: Any) -> Mapping[str, Any] | None:
    """Return what is known of the run that a checkpoint belongs to."""
    file = Path(str(checkpoint)).parent / "run.json" if checkpoint else None
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None


def run_single(arguments: list[str], project: Project, origin: Origin) -> int:
    """Run one LightningCLI command with tracking; return the exit code."""
    # the constructor trains; a failure in it must still reach the recorder
    cli = SingleCLI.__new__(SingleCLI)
    cli.recorder = None
    require_folder(project.runs)
    try:
        with quiet_lightning():
            cli.__init__(arguments, project, origin)  # type: ignore[misc]
    except BaseException as error:
        if cli.recorder is not None:
            _record_failure(cli.recorder, error)
        if isinstance(error, ValueError | MisconfigurationException) or ran_out_of_memory(error):
            raise UserError(first_cause(error)) from error
        raise
    _record_success(cli, arguments[0])
    return 0


def _record_failure(recorder: RunRecorder, error: BaseException) -> None:
    stopped = isinstance(error, KeyboardInterrupt | SIGTERMException | SystemExit)
    if not stopped:
        recorder.log_text("traceback.txt", "".join(traceback.format_exception(error)))
    recorder.finish("KILLED" if stopped else "FAILED")


def _record_success(cli: SingleCLI, subcommand: str) -> None:
    recorder, measurements = cli.recorder, cli.measurements
    assert recorder is not None
    assert measurements is not None
    # all processes of a run take part in saving, the first one writes
    written = subcommand == "fit" and write_checkpoint(cli.trainer, recorder.folder)
    if not cli.trainer.is_global_zero:
        return
    tags = {"complete": "true"}
    if written:
        publish_checkpoint(recorder.folder)
    if subcommand == "fit":
        write_final(cli.model, yaml.safe_load((recorder.folder / "config.yaml").read_text("utf-8")), recorder.folder)
        record_texts(cli.model, cli.trainer, recorder)
        recorder.log_points(measurements.summary(cli.trainer, cli.model), steps_of(cli.trainer, cli.model))
        tags["diverged"] = divergence_of(cli.model, measurements) or ""
    recorder.finish("FINISHED", tags)
    print(f"run {recorder.run_key} is recorded; its checkpoint and configuration lie in {run_folder_name(recorder)}")


def run_folder_name(recorder: RunRecorder) -> str:
    """Return the folder of a run as seen from the project."""
    return str(recorder.folder.relative_to(recorder.project.root))
