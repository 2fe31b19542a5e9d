"""The settings of a run: dataclasses, YAML files and dotted options.

The sections are ordered by who may change them: what is trained, on what data, how, how fast, and what is logged.
`probe` and `log` never change a result; `speed` only by rounding, except `accumulate`: a loss sees one micro-batch.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse
import yaml

from trainer import methods

PRESETS = Path(__file__).parent / "presets"
_LARGEST = 100_000  # characters of a YAML file
_MAX_DEPTH = 10  # levels of nesting in it


class UsageError(Exception):
    """A mistake in what was asked for: one sentence, exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on, and says why in one sentence: exit code 1."""


@dataclass(frozen=True)
class Data:
    """reading the images: the loader's keyword arguments"""

    num_threads: int | None = None
    """decoding threads per rank; by default the cores this process may use, divided among the ranks of the machine"""
    order: Literal["global", "block"] | None = None
    """"global" shuffles all samples; "block" shuffles shards, then samples within a window of shards: for storage that
    is slow at random reads. By default global on a disk, block for shards in a bucket or on the web"""
    prefetch: int = 2
    """batches that DALI works on ahead; each costs memory for its decoded images and views"""
    hw_decoder_load: float | None = None
    """share of the images that a GPU's JPEG engines decode, from 0 to 1; by default the fastest for the first batch"""
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
    """optimizer and schedule"""

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 1e-3
    """base learning rate: the peak is lr * batch_size / lr_batch"""
    lr_batch: int = 1024
    final_lr: float = 0.01
    """learning rate at the end, as a share of the peak"""
    schedule: Literal["cosine", "poly"] = "cosine"
    power: float = 0.9
    """of the schedule "poly": (1 - t)**power"""
    warmup_epochs: float = 15.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; the first is the momentum of LARS and SGD"""
    clip: float | None = 1.0
    """largest global norm of the gradient"""
    max_skipped: int = 10
    """steps in a row that a non-finite loss or gradient may skip before the run fails"""


@dataclass(frozen=True)
class Speed:
    """speed and memory"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast type; auto: bf16 on a GPU, fp32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """the method's forward pass as one compiled graph; auto: on a GPU"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """how ranks share the work; fsdp (FSDP2) also shards weights and optimizer state over them: for L, H and XL"""
    fsdp_copies: int = 1
    """fsdp: parts of the ranks that hold all weights each (HSDP); one a node keeps the gathering within nodes"""
    fsdp_gather: Literal["fp32", "bf16"] = "fp32"
    """fsdp: type in which the weights of the blocks are gathered; bf16 sends half as much, and needs precision bf16"""
    activation_checkpointing: bool = False
    """keep no activations within a block and compute them again in the backward pass: less memory, a third more work"""
    accumulate: int = 1
    """gradient accumulation: micro-batches per optimizer step; a loss sees one micro-batch at a time"""

    def precision_on(self, device: str) -> str:
        """What `precision` means on "cuda" or "cpu"."""
        return self.precision if self.precision != "auto" else "bf16" if device == "cuda" else "fp32"

    def compiles_on(self, device: str) -> bool:
        """What `compile` means on "cuda" or "cpu"."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")


@dataclass(frozen=True)
class Probe:
    """k-NN while training, with the weights that are exported; see trainer.evaluate and trainer.segment for more"""

    train: str | None = None
    """labelled shards in which neighbours are looked up; with val, turns the probe on"""
    val: str | None = None
    """labelled shards to classify"""
    every: float = 10.0
    """epochs between two scores; each is logged with the next line"""
    images: int = 10_000
    """at most this many images of each set, the same ones every time; the other ranks wait for the score"""
    segment_train: str | None = None
    """shards of images with label maps, whose patches are neighbours; with segment_val, turns the mIoU of k-NN on"""
    segment_val: str | None = None
    """shards of images with label maps to segment"""
    segment_images: int = 200
    """as `images`, of these sets"""


@dataclass(frozen=True)
class Log:
    """logging and checkpoints"""

    every: int = 50
    """steps between two lines; the only places where the host waits for the device"""
    checkpoint_every: int = 1000
    """steps between two checkpoints"""
    keep_last: int = 3
    """checkpoints that are kept, the newest ones"""
    keep_every: int | None = None
    """checkpoints at multiples of this many steps are kept for good"""
    tensorboard: bool = True
    wandb: str | None = None
    """a project's name turns it on"""
    profile: bool = False
    """trace five early steps into the run's folder and print where their time went"""


@dataclass(frozen=True)
class Run:
    """the run"""

    method: str = "loca"
    """what is trained: a file in trainer/methods"""
    shards: str | None = None
    """directory, DIRECTORY:SPLIT, brace pattern in quotes, or address; without it, photographs that scikit-image brings
    along"""
    out: str | None = None
    """folder of this run, runs/METHOD by default. The same command again resumes from its last checkpoint, and so does
    --out alone, with the settings of its config.yaml"""
    only: str | None = None
    """file that names the images to train on, one a line, by their keys or as files; by default all are"""
    init: str | None = None
    """checkpoint, or a run's folder, whose weights to start with, until the run has a checkpoint of its own"""
    seed: int = 0
    epochs: float = 100.0
    steps: int | None = None
    """length in steps, in place of epochs"""
    batch_size: int = 1024
    """samples per step over all ranks together"""
    stop_after: float | None = None
    """minutes after which to write a checkpoint and exit with 75, as a signal would; --out alone goes on without it"""
    patience: float = 0.0
    """minutes that storage which does not answer is waited for, after a read's own retries, before the run stops in the
    same way"""
    dry_run: bool = False
    """a few steps on noise: time, memory and operations of a step; nothing is read or written"""
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    probe: Probe = field(default_factory=Probe)
    log: Log = field(default_factory=Log)


# What a value that is not null must hold.
RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "must be positive",
        lambda x: x > 0,
        "epochs steps batch_size data.num_threads data.prefetch optim.lr_batch optim.clip optim.max_skipped "
        "speed.accumulate speed.fsdp_copies probe.every probe.images probe.segment_images log.every "
        "log.checkpoint_every log.keep_last log.keep_every optim.power",
    ),
    (
        "must not be negative",
        lambda x: x >= 0,
        "stop_after patience cache.size optim.lr optim.final_lr optim.warmup_epochs optim.weight_decay",
    ),
    ("must lie between 0 and 1", lambda x: 0 <= x <= 1, "data.hw_decoder_load data.max_bad"),
    ("must be at least 0 and below 1", lambda pair: all(0 <= x < 1 for x in pair), "optim.betas"),
    ("must be at least 0 and below 2**63", lambda x: 0 <= x < 2**63, "seed"),
]


@dataclass(frozen=True)
class Settings:
    run: Run
    method: Any  # the method's own Config
    text: str  # all of it as YAML

    @property
    def out(self) -> Path:
        return Path(self.run.out or f"runs/{self.run.method}")


def parse(argv: list[str]) -> Settings:
    """`resolve` of the options in `argv`. `--help` and `--print-config` print and exit. Raises UsageError."""
    given = options(argv)
    helps, prints = (given.pop(key, None) for key in ("help", "print_config"))
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=bool(helps))  # slow
    parser, parsed, settings = _resolve(given)
    if helps:
        parser.set_defaults(parsed)
        parser.print_help()
        raise SystemExit(0)
    if prints:
        print(settings.text, end="")
        raise SystemExit(0)
    return settings


def resolve(given: Mapping[str, Any]) -> Settings:
    """The settings that options by dotted name ask for: defaults < preset < the file `config` < the other options.

    The preset is the method's published run, or, without shards and without a file, a small one for the bundled
    photographs. `out` of an earlier run, without `config`, `method` and `shards`, stands for its config.yaml. A value
    is text, as on a command line, or what the setting holds. Raises UsageError.
    """
    return _resolve(given)[2]


def _resolve(given: Mapping[str, Any]) -> tuple[jsonargparse.ArgumentParser, dict[str, Any], Settings]:
    """A parser with all options, the values that are not its defaults by dotted name, and the settings."""
    file = _file(given)
    name, shards = ({**file, **given}.get(key) for key in ("method", "shards"))
    name = Run.method if name is None else name
    if name not in methods.names():
        raise UsageError(f"unknown method {name!r}: {_nearest(str(name), methods.names())}")
    preset = PRESETS / (f"{name}.yaml" if file or shards else f"{name}_demo.yaml")

    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        description=f"Pretrains a backbone with {name}. Other methods: --method {' | '.join(methods.names())}",
        exit_on_error=False,
    )
    parser.add_argument("--config", help="a preset's name, or a YAML file; its keys are these options")
    parser.add_argument("--print_config", nargs="?", help="print all settings as YAML, and exit")
    method_class = methods.load(name).Config
    parser.add_class_arguments(Run)
    parser.add_class_arguments(method_class, name)
    kinds = {**_leaves(Run), **_leaves(method_class, f"{name}.")}
    for action in parser._actions:  # jsonargparse offers to read a section from a file of its own: one file will do
        if any(key.startswith(f"{action.dest}.") for key in kinds):
            action.help = argparse.SUPPRESS

    own = {key: value for key, value in given.items() if key != "config"}
    values = {**(read_yaml(preset) if preset.exists() else {}), **file, **own}
    for key in values:
        if any(name.startswith(f"{key}.") for name in kinds):
            raise UsageError(f"{key} is a section: name one of its settings, as in {key}.NAME")
        if key not in kinds:
            raise UsageError(f"unknown option {key!r}: {methods.MOVED.get(key) or _nearest(key, [*kinds])}")
    try:
        parsed = parser.parse_object(values)
        _check(parsed, kinds)
        objects = parser.instantiate(parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        said = " ".join(str(error).replace("Parser key ", "").split())
        key = said.partition('"')[2].partition('"')[0]
        wanted = _wanted(kinds[key]) if said.startswith('"') and key in kinds else ""
        raise UsageError(f"{key} is {values[key]!r}: it must be {wanted}" if wanted else said) from None
    del parsed["config"], parsed["print_config"]
    text = parser.dump(parsed, skip_unset=False)
    run = Run(**{f.name: objects[f.name] for f in dataclasses.fields(Run)})
    return parser, {key: parsed[key] for key in values}, Settings(run, objects[name], text)


def _check(parsed: Any, kinds: dict[str, Any]) -> None:
    """Raises UsageError for a value that its type allows and that means nothing."""
    for key, kind in kinds.items():
        value = parsed[key]
        if value == "" or (value is None and type(None) not in get_args(kind)):
            raise UsageError(f"{key} is {'null' if value is None else 'empty'}: give it a value, or leave it out")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key} is {value}: it must be finite")
    for rule, holds, keys in RULES:
        for key in keys.split():
            if parsed[key] is not None and not holds(parsed[key]):
                raise UsageError(f"{key} is {parsed[key]}: it {rule}")
    if parsed["speed.fsdp_gather"] == "bf16" and parsed["speed.precision"] != "bf16":
        raise UsageError("speed.fsdp_gather bf16 needs speed.precision bf16, which takes the weights as bf16 anyway")
    for train, val in (("probe.train", "probe.val"), ("probe.segment_train", "probe.segment_val")):
        if (parsed[train] is None) != (parsed[val] is None):
            raise UsageError(f"{train} and {val} belong together")
        if parsed[train] and parsed["speed.parallel"] == "fsdp":
            raise UsageError("probe needs all weights on one rank, unlike fsdp: use trainer.evaluate, trainer.segment")


def check_paths(given: Mapping[str, Any]) -> None:
    """Raises UsageError for shards or weights that are not there. Needs no torch, which takes seconds to import.

    What is no plain path (a pattern, a list, an address, a split) is left to those who read it.
    """
    values = {**_file(given), **given}
    for key in ("shards", "only", "init", "probe.train", "probe.val", "probe.segment_train", "probe.segment_val"):
        path = values.get(key)
        if isinstance(path, str) and not set(path) & set("{,:") and not Path(path).exists():
            raise UsageError(f"--{key} {path}: there is no such file or folder")


def options(argv: list[str]) -> dict[str, Any]:
    """The options in `argv` by dotted name. Raises UsageError.

    An option is `--key value`, `--key=value`, or `--key` alone, which is true; a name's dashes are underscores.
    """
    found: dict[str, Any] = {}
    words = ["--help" if word == "-h" else word for word in reversed(argv)]
    while words:
        key, equals, value = words.pop().partition("=")
        if not key.startswith("--"):
            file = key.endswith(".tar") or Path(key).exists()
            quote = "; the shell has expanded a pattern: put it in quotes" if file else ""
            raise UsageError(f"{key!r} is no option: their names begin with --{quote}")
        if not equals:
            value = "true" if not words or words[-1].startswith("--") else words.pop()
        if not value:
            raise UsageError(f"{key} is empty: give it a value, or leave it out")
        found[key[2:].replace("-", "_")] = value
    return found


def _file(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the file that options mean, by dotted name; none where they mean none."""
    if "config" in given:
        return read_yaml(_named(str(given["config"])))
    earlier = Path(given.get("out", "")) / "config.yaml"
    resumes = "out" in given and not given.keys() & {"method", "shards"} and earlier.is_file()
    found = read_yaml(earlier) if resumes else {}
    found.pop("stop_after", None)  # it is of one start: who goes on after it wants to go on
    return found


def small(method: str) -> str:
    """What to do where a method's settings are too much for a CPU."""
    demo = (PRESETS / f"{method}_demo.yaml").is_file()
    return f"take the preset for a CPU, --config {method}_demo" if demo else "make the backbone and the views smaller"


def _named(config: str) -> Path:
    """The file that is meant by a path or by a preset's name."""
    path, preset = Path(config), PRESETS / f"{config}.yaml"
    if path.is_file() or "/" in config or path.suffix in (".yaml", ".yml"):
        return path
    if not preset.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UsageError(f"--config {config}: there is no such file, and no such preset; presets are {presets}")
    return preset


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's settings by dotted name: {"optim.lr": 0.1, ...}. Raises UsageError."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = load_yaml(file.read(_LARGEST + 1))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{path} must map options to values, as config.yaml in a run's folder does")
    return flat(tree)


def names_in(path: str) -> list[str]:
    """The names in a file of `only`, one a line. Raises UsageError."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--only {path}: cannot be read ({why})") from None
    if not any(names):
        raise UsageError(f"--only {path}: holds no name; name images, one a line")
    return [name for name in names if name]


def load_yaml(text: str) -> Any:
    """What a YAML text holds. Raises ValueError or YAMLError.

    Nothing is resolved before it is known to be small and flat: aliases can make gigabytes of a few lines.
    """
    if len(text) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST:,} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise ValueError(f"settings need no aliases and no more than {_MAX_DEPTH} levels")
    return yaml.safe_load(text)


def flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The types of a dataclass's fields by dotted name; of a nested dataclass, those of its fields."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        name = f"{prefix}{f.name}"
        found |= _leaves(f.type, f"{name}.") if dataclasses.is_dataclass(f.type) else {name: f.type}
    return found


def _wanted(kind: Any) -> str:
    """A simple type in words; nothing for another."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        parts = [_wanted(part) for part in get_args(kind)]
        return " or ".join(parts) if all(parts) else ""
    return words.get(kind, "")


def _nearest(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(choices))}"
