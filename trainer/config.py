"""The settings of a run: dataclasses, YAML files and dotted options.

The sections are in this order: what is trained, on what data, how, how fast, and what is logged. `probe` and `log`
never change what is learned. `speed` changes it by rounding only, except `accumulate`: a loss sees one micro-batch.
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
_MAX_DEPTH = 10  # levels of nesting in a YAML file


class UsageError(Exception):
    """Invalid input from the user. The message is one sentence; the command exits with code 2."""


class RunError(RuntimeError):
    """The run cannot continue. The message says why in one sentence; the command exits with code 1."""


@dataclass(frozen=True)
class Data:
    """data loading (keyword arguments of the loader)"""

    num_threads: int | None = None
    """decoding threads per rank. Default: the cores available to the process, divided by the ranks on this machine"""
    order: Literal["global", "block"] | None = None
    """"global" shuffles all samples. "block" shuffles shards, then samples within a window of shards, for storage that
    is slow at random reads. Default: global for local shards, block for shards in a bucket or on the web"""
    prefetch: int = 2
    """number of batches that DALI prepares ahead; each takes memory for its decoded images and views"""
    hw_decoder_load: float | None = None
    """fraction of images that the GPU's JPEG engines decode, from 0 to 1. Default: the fastest on the first batch"""
    max_bad: float | None = None
    """fraction of bad samples above which the run lists them and stops. Default: 0.01, but at least 32 samples"""
    form: Literal["auto", "fused", "operators", "triton"] = "auto"
    """implementation that cuts the views (docs/gpu.md). auto: fused on a CPU, operators on a GPU"""


@dataclass(frozen=True)
class Cache:
    """local cache for shards in a bucket or on a web server"""

    folder: Path | None = None
    """folder of the cache, best on a local disk of the node. Default: inside the user's cache folder"""
    size: float = 16.0
    """maximum size in GB (1e9 bytes). 0 turns the cache off: every image is read over the network"""


@dataclass(frozen=True)
class Optim:
    """optimizer and schedule"""

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 1e-3
    """base learning rate; the peak is lr * batch_size / lr_batch"""
    lr_batch: int = 1024
    """batch size for which lr is the peak learning rate"""
    final_lr: float = 0.01
    """learning rate at the end of the run, as a fraction of the peak"""
    schedule: Literal["cosine", "poly"] = "cosine"
    power: float = 0.9
    """exponent of the schedule "poly", which decays as (1 - t)**power"""
    warmup_epochs: float = 15.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    """betas of AdamW; LARS and SGD take the first as their momentum"""
    clip: float | None = 1.0
    """maximum global norm of the gradient; null turns clipping off"""
    max_skipped: int = 10
    """the run fails after this many consecutive steps with a non-finite loss or gradient; the steps are skipped"""


@dataclass(frozen=True)
class Speed:
    """speed and memory"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast type. auto: bf16 on a GPU, fp32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the method's forward pass as one graph (with fsdp, one graph per block). auto: on for a GPU"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """how ranks share the work. fsdp (FSDP2) also shards weights and optimizer state; meant for L, H and XL models"""
    fsdp_copies: int = 1
    """fsdp: number of complete copies of the weights, each sharded over a part of the ranks (HSDP). With one copy per
    node, weights are gathered within the node only"""
    fsdp_gather: Literal["fp32", "bf16"] = "fp32"
    """fsdp: type in which the weights of the blocks are gathered. bf16 halves the traffic and needs precision bf16"""
    activation_checkpointing: bool = False
    """drop the activations within each block and recompute them in the backward pass: less memory, a third more work"""
    accumulate: int = 1
    """gradient accumulation: number of micro-batches per optimizer step. A loss sees one micro-batch at a time"""

    def precision_on(self, device: str) -> str:
        """Return `precision` with "auto" resolved for `device`, "cuda" or "cpu"."""
        return self.precision if self.precision != "auto" else "bf16" if device == "cuda" else "fp32"

    def compiles_on(self, device: str) -> bool:
        """Return `compile` with "auto" resolved for `device`, "cuda" or "cpu"."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")


@dataclass(frozen=True)
class Probe:
    """k-NN evaluation, during training, of the backbone to be exported (more: trainer.evaluate, trainer.segment)"""

    train: str | None = None
    """labelled shards in which neighbours are looked up. With val, turns k-NN classification on"""
    val: str | None = None
    """labelled shards to classify"""
    every: float = 10.0
    """epochs between two evaluations; the scores appear in the next log line"""
    images: int = 10_000
    """maximum number of images from train and from val, the same ones every time. Other ranks wait for rank 0"""
    segment_train: str | None = None
    """shards with label maps in whose patches neighbours are looked up. With segment_val, turns k-NN segmentation on"""
    segment_val: str | None = None
    """shards with label maps to segment; the score is their mIoU"""
    segment_images: int = 200
    """maximum number of images from segment_train and from segment_val, the same ones every time"""


@dataclass(frozen=True)
class Log:
    """logging and checkpoints"""

    every: int = 50
    """steps between two log lines; the host waits for the device only there and at checkpoints"""
    checkpoint_every: int = 1000
    """steps between two checkpoints"""
    keep_last: int = 3
    """number of newest checkpoints to keep"""
    keep_every: int | None = None
    """in addition, keep every checkpoint whose step is a multiple of this number"""
    tensorboard: bool = True
    """write TensorBoard events to the run's folder"""
    wandb: str | None = None
    """name of a Weights & Biases project; turns logging to it on"""
    profile: bool = False
    """write a trace of five early steps to the run's folder, and print how their time was spent"""


@dataclass(frozen=True)
class Run:
    """the run"""

    method: str = "loca"
    """what to train: the name of a file in trainer/methods"""
    shards: str | None = None
    """training images: a directory, DIRECTORY:SPLIT, a quoted brace pattern, or an address. Default: the photographs
    that come with scikit-image"""
    out: str | None = None
    """folder of this run; default: runs/METHOD. The same command resumes from the last checkpoint in it. --out alone
    also resumes, with the settings in its config.yaml"""
    only: str | None = None
    """text file that lists the images to train on, one per line, by key or by file name. Default: all images"""
    init: str | None = None
    """checkpoint file, or folder of a run, with the initial weights. Not used when the run resumes"""
    seed: int = 0
    epochs: float = 100.0
    steps: int | None = None
    """length of the run in steps; overrides epochs"""
    batch_size: int = 1024
    """samples per optimizer step, over all ranks together"""
    stop_after: float | None = None
    """time limit in minutes: the run then writes a checkpoint and exits with code 75, as after a signal. Resuming with
    --out alone drops this limit"""
    patience: float = 0.0
    """minutes to wait for storage that does not respond, after the retries of each read. Then the run writes a
    checkpoint and exits with code 75"""
    dry_run: bool = False
    """run a few steps on random images and print a step's time, memory and operations. Reads and writes no data"""
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    probe: Probe = field(default_factory=Probe)
    log: Log = field(default_factory=Log)


# Conditions on values that are not null: the message, the test, and the settings it applies to.
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
    ("must be at most 1e9", lambda x: x <= 1e9, "epochs steps"),
]


@dataclass(frozen=True)
class Settings:
    run: Run
    method: Any  # the method's own Config
    text: str  # all settings as YAML

    @property
    def out(self) -> Path:
        return Path(self.run.out or f"runs/{self.run.method}")


def parse(argv: list[str]) -> Settings:
    """Return the settings that `argv` describes. `--help` and `--print-config` print and exit. Raises UsageError."""
    given = options(argv)
    helps, prints = (given.pop(key, None) for key in ("help", "print_config"))
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=bool(helps))  # slow, so only for --help
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
    """Return the settings for `given`, options by dotted name. Precedence: options > `config` file > preset > defaults.

    The preset is the method's published run. Without shards and without a file, it is a small run on the bundled
    photographs. If `given` has the `out` of an earlier run but no `config`, `method` or `shards`, that run's
    config.yaml is the file. A value is text, as on a command line, or has the setting's own type. Raises UsageError.
    """
    return _resolve(given)[2]


def _resolve(given: Mapping[str, Any]) -> tuple[jsonargparse.ArgumentParser, dict[str, Any], Settings]:
    """Return a parser with all options, the values set by preset, file or option (by dotted name), and the settings."""
    file = _file(given)
    name, shards = ({**file, **given}.get(key) for key in ("method", "shards"))
    name = Run.method if name is None else name
    if name not in methods.names():
        raise UsageError(f"unknown method {name!r}: {_nearest(str(name), methods.names())}")
    preset = PRESETS / (f"{name}.yaml" if file or shards else f"{name}_demo.yaml")

    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        description=f"Train with the method {name}. Other methods: --method {' | '.join(methods.names())}",
        exit_on_error=False,
    )
    parser.add_argument("--config", help="name of a preset, or YAML file with these options as keys")
    parser.add_argument("--print_config", nargs="?", help="print all settings as YAML and exit")
    method_class = methods.load(name).Config
    parser.add_class_arguments(Run)
    parser.add_class_arguments(method_class, name)
    kinds = {**_leaves(Run), **_leaves(method_class, f"{name}.")}
    for action in parser._actions:  # hide jsonargparse's options that read one section from a file: --config suffices
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
    """Raise UsageError for a value that has the right type but makes no sense."""
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
    """Raise UsageError for shards or weights that do not exist. Needs no torch, which takes seconds to import.

    Only plain paths are checked here. Patterns, lists, addresses and splits are checked when they are opened.
    """
    values = {**_file(given), **given}
    for key in ("shards", "only", "init", "probe.train", "probe.val", "probe.segment_train", "probe.segment_val"):
        path = values.get(key)
        if isinstance(path, str) and not set(path) & set("{,:") and not Path(path).exists():
            raise UsageError(f"--{key} {path}: there is no such file or folder")


def options(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv` by dotted name. Raises UsageError.

    An option is `--key value`, `--key=value`, or `--key` alone, which means true. Dashes in a name become underscores.
    """
    found: dict[str, Any] = {}
    words = ["--help" if word == "-h" else word for word in reversed(argv)]
    while words:
        key, equals, value = words.pop().partition("=")
        if not key.startswith("--"):
            file = key.endswith(".tar") or Path(key).exists()
            quote = "; the shell has expanded a pattern: put it in quotes" if file else ""
            raise UsageError(f"{key!r} is not an option: option names begin with --{quote}")
        if not equals:
            value = "true" if not words or words[-1].startswith("--") else words.pop()
        if not value:
            raise UsageError(f"{key} is empty: give it a value, or leave it out")
        found[key[2:].replace("-", "_")] = value
    return found


def _file(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by dotted name, of the file that `given` refers to; empty if it refers to none."""
    if "config" in given:
        return read_yaml(_named(str(given["config"])))
    earlier = Path(given.get("out", "")) / "config.yaml"
    resumes = "out" in given and not given.keys() & {"method", "shards"} and earlier.is_file()
    found = read_yaml(earlier) if resumes else {}
    found.pop("stop_after", None)  # a time limit applies to one start only, so a resumed run does not inherit it
    return found


def small(method: str) -> str:
    """Return advice, for an error message, on settings of `method` that are too large for a CPU."""
    demo = (PRESETS / f"{method}_demo.yaml").is_file()
    return f"take the preset for a CPU, --config {method}_demo" if demo else "make the backbone and the views smaller"


def _named(config: str) -> Path:
    """Return the file that `config`, a path or a preset's name, refers to. Raises UsageError for an unknown preset."""
    path, preset = Path(config), PRESETS / f"{config}.yaml"
    if path.is_file() or "/" in config or path.suffix in (".yaml", ".yml"):
        return path
    if not preset.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UsageError(f"--config {config}: there is no such file, and no such preset; presets are {presets}")
    return preset


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file by dotted name: {"optim.lr": 0.1, ...}. Raises UsageError."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = load_yaml(file.read(_LARGEST + 1))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{path} must map options to values, as config.yaml in a run's folder does")
    return flat(tree)


def names_in(path: str) -> list[str]:
    """Return the image names in the text file `path`, the value of `--only`. Raises UsageError."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"--only {path}: cannot be read ({why})") from None
    if not any(names):
        raise UsageError(f"--only {path}: holds no name; name images, one a line")
    return [name for name in names if name]


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raises ValueError or YAMLError.

    Size, depth and aliases are checked before anything is built, because aliases can turn a few lines into gigabytes.
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
    """Return the leaves of nested mappings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of a dataclass's fields by dotted name, with nested dataclasses expanded."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        name = f"{prefix}{f.name}"
        found |= _leaves(f.type, f"{name}.") if dataclasses.is_dataclass(f.type) else {name: f.type}
    return found


def _wanted(kind: Any) -> str:
    """Return a simple type in words, for an error message; "" for any other type."""
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
