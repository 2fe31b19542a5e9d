"""The settings of a run: dataclasses, YAML and dotted overrides.

The sections are ordered by who may touch them: what is learnt, from what, how, how fast, and what is told meanwhile.
Only `speed`, `probe` and `log` never change a result.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from trainer import methods

PRESETS = Path(__file__).parent / "presets"


class UsageError(Exception):
    """A mistake in what was asked for: one sentence, exit code 2."""


@dataclass(frozen=True)
class Data:
    """how the images are read"""

    threads: int | None = None
    """decoding threads per rank; by default the cores this process may use, divided among the ranks of the machine"""
    order: Literal["global", "block"] | None = None
    """"global" shuffles all samples; "block" shuffles shards, then samples within a window of shards: for storage that
    is slow at random reads. By default global on a disk, block for shards in a bucket or on the web"""
    prefetch: int = 2
    """batches that DALI works on ahead; each costs memory for its decoded images and views"""
    hw_decoder_load: float | None = None
    """share of the images that a GPU's JPEG engines decode, from 0 to 1 (default: DALI's); bench_loader.py --tune"""
    max_bad: float | None = None
    """share of bad samples above which the run stops and lists them; a hundredth, but at least 32, by default"""
    form: Literal["auto", "fused", "operators", "triton"] = "auto"
    """how views are cut (docs/gpu.md); auto: fused on a CPU, operators on a GPU"""


@dataclass(frozen=True)
class Cache:
    """where shards of a bucket or a web server are kept on this machine"""

    folder: Path | None = None
    """best on the node's own disk; by default in the user's cache folder"""
    size: float = 16.0
    """GB (1e9 bytes) of it, at most; 0: every image is read over the network"""


@dataclass(frozen=True)
class Optim:
    """how the weights move"""

    name: Literal["adamw", "lars"] = "adamw"
    lr: float = 1e-3
    """base learning rate: the peak is lr * batch_size / lr_batch"""
    lr_batch: int = 1024
    final_lr: float = 0.01
    """share of the peak that is left at the end"""
    warmup_epochs: float = 15
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; the first is LARS's momentum"""
    clip: float | None = 1.0
    """largest global norm of the gradient"""
    max_skipped: int = 10
    """steps in a row that a non-finite loss or gradient may skip before the run ends"""


@dataclass(frozen=True)
class Speed:
    """how fast it goes, and in how much memory"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast type; auto: bf16 on a GPU, fp32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """the method's step as one compiled graph; auto: on a GPU"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """how ranks share the work; fsdp (FSDP2) also shards weights and optimizer state over them: for L, H and XL"""
    recompute: bool = False
    """every block's activations are computed again in the backward pass: less memory, a third more work"""
    accumulate: int = 1
    """the global batch in so many slices and one optimizer step; a loss sees one slice at a time"""


@dataclass(frozen=True)
class Probe:
    """k-NN while training, by the weights that are exported; trainer.evaluate and trainer.segment tell more"""

    train: str | None = None
    """labelled shards to look for neighbours in; with val, turns the probe on"""
    val: str | None = None
    """labelled shards to classify"""
    every: float = 10
    """epochs between two scores; each stands in the next line of the log"""
    images: int = 10_000
    """at most so many of each set, the same ones every time; the other ranks wait meanwhile"""
    segment_train: str | None = None
    """shards of images with label maps, whose patches are neighbours; with segment_val, turns the mIoU of k-NN on"""
    segment_val: str | None = None
    """shards of images with label maps to segment"""
    segment_images: int = 200
    """as `images`, of these sets"""


@dataclass(frozen=True)
class Log:
    """what is told and kept meanwhile"""

    every: int = 50
    """steps between two lines; the only places where the host waits for the device"""
    checkpoint_every: int = 1000
    """steps between two checkpoints"""
    keep_last: int = 3
    keep_every: int | None = None
    """checkpoints at multiples of this many steps are kept for good"""
    tensorboard: bool = True
    wandb: str | None = None
    """a project's name turns it on"""
    profile: bool = False
    """trace five early steps into the run's folder and print what they spent their time on"""


@dataclass(frozen=True)
class Run:
    """the run"""

    method: str = "loca"
    """what is learnt: a file in trainer/methods"""
    shards: str | None = None
    """directory, brace pattern or list of tars; without it, photographs that scikit-image brings along"""
    out: str | None = None
    """folder of this run; runs/METHOD by default. The same command again goes on from its last checkpoint"""
    init: str | None = None
    """checkpoint, or a run's folder, whose weights to start with, until the run has a checkpoint of its own"""
    seed: int = 0
    epochs: float = 100
    steps: int | None = None
    """length in steps, in place of epochs"""
    batch_size: int = 1024
    """samples per step over all ranks together"""
    stop_after: float | None = None
    """minutes after which to write a checkpoint and exit with 75, as a signal would"""
    dry_run: bool = False
    """a few steps on noise: time, memory and operations of a step; nothing is read or written"""
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    probe: Probe = field(default_factory=Probe)
    log: Log = field(default_factory=Log)


@dataclass(frozen=True)
class Settings:
    run: Run
    method: Any  # the method's own Config
    text: str  # all of it as YAML

    @property
    def out(self) -> Path:
        return Path(self.run.out or f"runs/{self.run.method}")


def parse(argv: list[str]) -> Settings:
    """The settings that `argv` asks for: defaults < preset < `--config` < the other options. Raises UsageError.

    The preset is the method's published run, or, without shards and without a file, a small one for the bundled
    photographs. `--help` and `--print-config` print and exit.
    """
    early = _early(argv)
    name = early["method"]
    if name not in methods.names():
        raise UsageError(f"unknown method {name!r}: {_nearest(name, methods.names())}")
    preset = name if early["shards"] or early["config"] else f"{name}_demo"
    preset_file = PRESETS / f"{preset}.yaml"

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        description=f"Pretrains a backbone with {name}. Other methods: --method {' | '.join(methods.names())}",
        exit_on_error=False,
        default_config_files=[str(preset_file)] if preset_file.exists() else [],
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="YAML file; its keys are these options")
    parser.add_class_arguments(Run)
    method_class = methods.load(name).Config
    parser.add_class_arguments(method_class, name)

    known = {**_fields(Run), name: method_class, **{f"{name}.{key}": t for key, t in _fields(method_class).items()}}
    flags = {key for key, kind in known.items() if kind is bool}
    for key in [_option(word) for word in argv if word.startswith("--")] + _flat(early["file"]):
        if key not in [*known, "config", "help", "print-config"] and not key.isdigit():
            raise UsageError(f"unknown option {key!r}: {_nearest(key, list(known))}")
    try:
        words = [_dashes(word) for word in argv]
        for i, word in enumerate(words):  # a switch alone turns it on
            if word.removeprefix("--") in flags and (i + 1 == len(words) or words[i + 1].startswith("--")):
                words[i] += "=true"
        parsed = parser.parse_args(words)
        objects = parser.instantiate(parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    run = Run(**{f.name: objects[f.name] for f in dataclasses.fields(Run)})
    if run.batch_size < 1 or run.epochs <= 0 or (run.steps is not None and run.steps < 1):
        raise UsageError("batch_size, epochs and steps must be positive")
    if run.speed.accumulate < 1 or run.log.every < 1 or run.log.checkpoint_every < 1:
        raise UsageError("speed.accumulate, log.every and log.checkpoint_every must be positive")
    if run.log.keep_last < 1 or run.optim.lr_batch < 1:
        raise UsageError("log.keep_last and optim.lr_batch must be positive")
    probe = run.probe
    for train, val in (("train", "val"), ("segment_train", "segment_val")):
        if (getattr(probe, train) is None) != (getattr(probe, val) is None):
            raise UsageError(f"probe.{train} and probe.{val} belong together")
    if min(probe.every, probe.images, probe.segment_images) <= 0:
        raise UsageError("probe.every, probe.images and probe.segment_images must be positive")
    if (probe.train or probe.segment_train) and run.speed.parallel == "fsdp":
        raise UsageError("probe needs all weights on one rank, unlike fsdp: use trainer.evaluate or trainer.segment")
    del parsed["config"]
    return Settings(run, objects[name], parser.dump(parsed))


def _early(argv: list[str]) -> dict[str, Any]:
    """What decides how the rest is parsed: the method, and whether shards or a file are named."""
    found: dict[str, Any] = {"method": None, "shards": None, "config": None, "file": {}}
    for i, word in enumerate(argv):
        key, _, value = word[2:].partition("=")
        if word.startswith("--") and key in found:
            found[key] = value or (argv[i + 1] if i + 1 < len(argv) else "")
    if found["config"]:
        try:
            found["file"] = yaml.safe_load(Path(found["config"]).read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"--config {found['config']}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(found["file"], dict):
            raise UsageError(f"--config {found['config']}: must hold a mapping of options to values")
    found["method"] = found["method"] or found["file"].get("method") or Run.method
    found["shards"] = found["shards"] or found["file"].get("shards")
    return found


def _option(word: str) -> str:
    return _dashes(word)[2:].partition("=")[0]


def _dashes(word: str) -> str:
    """`--stop-after 5` for `--stop_after 5`: both spellings are typed, the fields have one."""
    if not word.startswith("--") or word.startswith("--print-config"):
        return word
    key, equals, value = word.partition("=")
    return "--" + key[2:].replace("-", "_") + equals + value


def _fields(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, and, dotted, of those within."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        found[f.name] = f.type
        if dataclasses.is_dataclass(f.type):
            found |= {f"{f.name}.{key}": kind for key, kind in _fields(f.type).items()}  # type: ignore[arg-type]
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flat(value, f"{prefix}{key}.")
    return keys


def _nearest(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(choices))}"
