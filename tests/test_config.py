"""Settings: defaults < preset < file < options, and one sentence for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer import config, methods
from trainer.method import Method

ROOT = Path(__file__).resolve().parents[1]


def test_options_beat_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\noptim: {lr: 0.5, clip: 2.0}\n")
    settings = config.parse(["--shards", "x", "--config", str(file), "--optim.lr", "1e-4"])
    assert (settings.run.seed, settings.run.optim.lr, settings.run.optim.clip) == (3, 1e-4, 2.0)


def test_the_resolved_settings_are_a_config_file(tmp_path: Path) -> None:
    settings = config.parse(["--shards", "x", "--seed", "7"])
    file = tmp_path / "c.yaml"
    file.write_text(settings.text)
    again = config.parse(["--config", str(file)])
    assert again.run == settings.run
    assert vars(again.method) == vars(settings.method)
    assert yaml.safe_load(settings.text)["seed"] == 7


def test_what_is_null_stays_null(tmp_path: Path) -> None:
    """LOCA's preset clips gradients: a run without says so in its config.yaml."""
    file = tmp_path / "c.yaml"
    file.write_text(config.parse(["--shards", "x", "--optim.clip", "null"]).text)
    assert config.parse(["--config", str(file)]).run.optim.clip is None


@pytest.mark.parametrize("argv", [["--steps", "2", "--config", "FILE"], ["--config=FILE", "--steps=2"]])
def test_options_beat_the_file_wherever_it_stands(tmp_path: Path, argv: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 1500\nseed: 3\n")
    settings = config.parse([word.replace("FILE", str(file)) for word in argv])
    assert (settings.run.steps, settings.run.seed) == (2, 3)


def test_the_folder_of_a_run_names_its_settings(tmp_path: Path) -> None:
    """`--out` alone goes on with config.yaml; with another method or other shards it is a run of its own."""
    first = config.parse(["--method", "vicregl", "--shards", "x", "--seed", "7", "--out", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(first.text)
    assert config.parse(["--out", str(tmp_path)]) == first
    longer = config.parse(["--out", str(tmp_path), "--steps", "3000"])
    assert (longer.run.seed, longer.run.steps, longer.run.method) == (7, 3000, "vicregl")
    assert config.parse(["--out", str(tmp_path), "--method", "loca"]).run.seed == 0


def test_a_time_limit_holds_for_the_start_that_names_it(tmp_path: Path) -> None:
    """A limit of the folder's own would stop every start after it, and nobody would know why."""
    limited = config.parse(["--shards", "x", "--seed", "7", "--stop-after", "600", "--out", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(limited.text)
    assert limited.run.stop_after == 600
    assert config.parse(["--out", str(tmp_path)]).run.stop_after is None
    again = config.parse(["--out", str(tmp_path), "--stop-after", "5"]).run
    assert (again.stop_after, again.seed) == (5, 7)


def test_a_preset_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of that name comes first."""
    assert config.parse(["--shards", "x", "--config", "loca_s16_1k_600ep"]).run.epochs == 600
    monkeypatch.chdir(tmp_path)
    Path("loca_s16_1k_600ep").write_text("epochs: 3\n")
    assert config.parse(["--shards", "x", "--config", "loca_s16_1k_600ep"]).run.epochs == 3


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        config.parse(["--config", "vicregl_resnet50_100ep", "--optim.lr", "0.125", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "default: resnet50)" in told and "default: lars)" in told and "default: 0.125)" in told


def test_values_may_be_what_they_mean() -> None:
    """As `trainer.train` gives them; as text they mean the same."""
    typed = {"shards": "x", "batch_size": 8, "optim.clip": None, "optim.betas": (0.8, 0.9), "loca.views.flip": 0.25}
    words = "--shards x --batch-size 8 --optim.clip null --optim.betas [0.8,0.9] --loca.views.flip 0.25".split()
    assert config.resolve(typed).text == config.parse(words).text


def test_both_spellings_of_an_option() -> None:
    assert config.parse(["--shards", "x", "--stop-after", "5"]).run.stop_after == 5


@pytest.mark.parametrize(
    "argv", [["--dry-run"], ["--dry-run", "--seed", "1"], ["--dry_run", "true"], ["--dry-run=true"]]
)
def test_a_switch_alone_turns_it_on(argv: list[str]) -> None:
    settings = config.parse(["--shards", "x", *argv, "--vicregl.locations", "false", "--method", "vicregl"])
    assert settings.run.dry_run and not settings.method.locations


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--method", "lorca"], "did you mean 'loca'"),
        (["--optim.lrr", "1"], "did you mean 'optim.lr'"),
        (["--loca.focal_scale", "[0.1, 0.2]"], "did you mean 'loca.views.focal_scale'"),
        (["--loca.queries", "10"], "loca.views.focal_views"),
        (["--batchsize", "1"], "did you mean 'batch_size'"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "loca_600ep"], "no such preset; presets are finetune, .*, loca, loca_b16_1k_600ep, "),
        (["--shards", "a-0.tar", "a-1.tar"], "'a-1.tar' is not an option.*a pattern: put it in quotes"),
        (["--batch_size", "0"], "positive"),
        (["--stop_after", "none"], "stop_after is 'none': it must be a number or null"),
        (["--data.order", "any"], r"data\.order is 'any': it must be one of global, block or null"),
        (["--log.tensorboard", "maybe"], r"log\.tensorboard is 'maybe': it must be true or false"),
        (["--log.keep_last", "0"], r"log\.keep_last"),
        (["--optim.lr_batch", "0"], r"optim\.lr_batch"),
        (["--probe.train", "x"], "belong together"),
        (["--speed.fsdp_gather", "bf16"], r"needs speed\.precision bf16"),
        (["--probe.train", "x", "--probe.val", "x", "--speed.parallel", "fsdp"], "trainer.evaluate"),
    ],
)
def test_a_mistake_is_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(config.UsageError, match=sentence) as error:
        config.parse(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    "--shards= --out= --method= --init= --config= --log.wandb= --seed=-1 --seed=9223372036854775808 --steps=0 "
    "--optim.betas=[2.0,0.9] --optim.betas=[0.9,-1] --optim.lr=-1 --optim.clip=-1 --optim.clip=0 --epochs=.inf "
    "--optim.weight_decay=-0.1 --optim.warmup_epochs=-1 --optim.final_lr=-1 --optim.lr=.nan --log.keep_every=0 "
    "--stop_after=-1 --optim.max_skipped=0 --data.prefetch=1.5 --data.max_bad=2 --optim=/etc/passwd --loca=5 --config "
    "--loca.eta=null --speed.recompute=true --epochs=1e300 stray".split(),
)
def test_nonsense_is_named(option: str) -> None:
    with pytest.raises(config.UsageError) as error:
        config.parse([*([] if option.startswith("--shards") else ["--shards", "x"]), option])
    assert option.partition("=")[0].removeprefix("--").partition(".")[0] in str(error.value)
    assert "\n" not in str(error.value) and "root:" not in str(error.value)


LAUGHS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{c}: &{c} {{x: *{d}, y: *{d}}}\n" for c, d in zip("bcdefg", "abcdef", strict=True)
)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "map"),
        ("# nothing\n", "map"),
        ("- 1\n", "map"),
        ("batch_size: null", "batch_size"),
        ("method: 5", "method"),
        ("method: [a]", "method"),
        ("optim: 5", "optim"),
        ("optim:", "optim"),
        ("loca: 5", "loca"),
        ("1: 2", "'1'"),
        ("config: /etc/passwd", "'config'"),
        ("a: &a {b: *a}", "aliases"),
        (LAUGHS, "aliases"),
        ("a: " + "[" * 20_000, "levels"),
        ("a: " + "x" * 200_000, "characters"),
        ("seed: " + "1" * 5000, "read"),
        ("seed: [1, 2", "read"),
    ],
)
def test_a_file_that_is_no_settings_is_a_mistake(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(config.UsageError) as error:
        config.parse(["--shards", "x", "--config", str(file)])
    assert word in str(error.value)
    assert "\n" not in str(error.value) and "root:" not in str(error.value)


def test_a_file_that_is_no_text_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\0\xff")
    with pytest.raises(config.UsageError, match="cannot be read"):
        config.parse(["--config", str(file)])


def test_an_unknown_key_in_a_file_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {wieght_decay: 1}\n")
    with pytest.raises(config.UsageError, match=r"did you mean 'optim\.weight_decay'"):
        config.parse(["--config", str(file)])


def test_a_file_that_begins_with_an_underscore_is_no_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("third", "_helper", "__init__"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    assert methods.names() == ["third"]


def test_every_method_is_of_the_base_class() -> None:
    assert methods.names()
    assert all(issubclass(methods.load(name).Method, Method) for name in methods.names())


@pytest.mark.parametrize("preset", sorted(p.stem for p in config.PRESETS.glob("*.yaml")))
def test_every_preset_parses(preset: str) -> None:
    settings = config.parse(["--shards", "x", "--config", str(config.PRESETS / f"{preset}.yaml")])
    methods.load(settings.run.method).views(methods.load(settings.run.method).Config(**vars(settings.method)))


def test_the_program_exits_with_2_and_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "trainer/run.py", "--optim.lrr", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "optim.lr" in done.stderr


@pytest.mark.parametrize("option", ["shards", "init", "probe.train", "probe.val"])
def test_what_is_not_there_is_found_before_torch_is_imported(tmp_path: Path, option: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{option}: /nowhere/at/all\n")
    for argv in ([f"--{option}", "/nowhere/at/all"], ["--config", str(file)]):
        with pytest.raises(config.UsageError, match="/nowhere/at/all"):
            config.check_paths(config.options(argv))
    config.check_paths({option: f"{tmp_path}/x-{{00..07}}.tar", "config": str(file)})
    code = "import sys; from trainer import config; config.check_paths({}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_file_of_names(tmp_path: Path) -> None:
    """Blank lines and the ends of lines of another system are no names."""
    path = tmp_path / "names.txt"
    path.write_bytes(b"a.jpg\r\n\r\nb \n")
    assert config.names_in(str(path)) == ["a.jpg", "b"]
    for content, why in ((b"\n \n", "holds no name"), (b"\xb5\xff", "it is not text")):
        path.write_bytes(content)
        with pytest.raises(config.UsageError, match=f"names.txt: .*{why}"):
            config.names_in(str(path))
    with pytest.raises(config.UsageError, match="Is a directory"):
        config.names_in(str(tmp_path))
