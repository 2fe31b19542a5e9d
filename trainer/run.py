"""Pretrain a backbone. The function `train` is the whole program: setup, model, data, resume, loop, teardown.

    torchrun trainer/run.py --method loca                                            bundled photographs, minutes
    torchrun --nproc_per_node=8 trainer/run.py --method loca --shards DIR --out runs/loca
    torchrun --nproc_per_node=8 trainer/run.py --out runs/loca                       resumes; so does the same command
    python trainer/run.py --method loca --help                                       every setting

Exit codes: 0 done; 1 failed (the last checkpoint is kept); 2 usage; 75 stopped by a signal, a time limit or a storage
outage, after writing a checkpoint. Under torchrun a stopped run exits with 0, since torchrun would restart it
otherwise. `status.json` in the run's folder holds the outcome.
"""

import itertools
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline import Batch, Loader, ShardSet
    from trainer import cost, metrics
    from trainer.evaluate import Probe
    from trainer.method import Method
    from trainer.segmentation.monitor import Monitor
    from trainer.step import TrainingStep

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C exits without a traceback until there is something to save
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, not trainer/: its files are not top-level

from trainer import config, folder
from trainer.folder import Result


def main(argv: list[str]) -> int:
    """Run what `argv` describes and return the exit code. Raises UsageError and RunError."""
    # OpenMP threads that spin while they wait starve a shared CPU. Measured on two cores with a busy neighbour:
    # 6 images/s spinning, 61 sleeping; without a neighbour, 117 and 105. Must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config.check_paths(config.options(argv))
    result = start(config.parse(argv))
    return folder.stop_code() if result.state == "stopped" else 0


def start(settings: config.Settings) -> Result:
    """Start or resume the run that the settings describe. Raises UsageError and RunError."""
    writes = os.environ.get("RANK", "0") == "0" and not settings.run.dry_run
    with folder.held(settings.out) if writes else nullcontext() as out:
        return train(settings, out)


def train(settings: config.Settings, out: folder.RunFolder | None) -> Result:
    """Train. `out` is the run's folder on rank 0; it is None on the other ranks and in a dry run."""
    import torch
    from torch.profiler import record_function as span

    from pipeline import Loader, ReadError, ShardError, ShardSet
    from trainer import backbones, checkpoint, cost, demo, methods, metrics, optim, parallel, report, schedules
    from trainer.console import informing, summary
    from trainer.evaluate import Probe
    from trainer.feed import Feed
    from trainer.interrupt import Interrupt
    from trainer.method import Method
    from trainer.segmentation.monitor import Monitor
    from trainer.step import TrainingStep

    # ---------------------------------------------------------------- setup
    cfg = settings.run
    changes = out.changes(settings) if out else []
    device = parallel.connect()
    rank, world_size = parallel.rank(), parallel.world_size()
    is_main, local_world_size = rank == 0, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    micro_batches = world_size * cfg.speed.accumulate
    micro_batch = cfg.batch_size // micro_batches
    if cfg.batch_size % micro_batches:
        parts = f"{world_size} ranks x {cfg.speed.accumulate} micro-batches"
        raise config.UsageError(f"batch_size {cfg.batch_size} is not a multiple of {micro_batches}, {parts}")

    # ---------------------------------------------------------------- model
    module = methods.load(cfg.method)
    try:
        recipe = module.views(settings.method)
        estimate = cost.estimate(
            lambda: module.Method(settings.method),
            recipe,
            micro_batch,
            device,
            states=optim.STATES[cfg.optim.name],
            checkpointing=cfg.speed.activation_checkpointing,
        )
        if device.type == "cpu":
            cost.require_memory(estimate.memory * local_world_size, config.small(cfg.method))
        torch.manual_seed(cfg.seed)
        method: Method = module.Method(settings.method).to(device)
    except ValueError as error:
        raise config.UsageError(f"--{cfg.method}: {error}") from None
    if cfg.speed.activation_checkpointing:
        backbones.checkpoint_activations_(method)
    if sharded := cfg.speed.parallel == "fsdp" and world_size > 1:
        gather = torch.bfloat16 if cfg.speed.fsdp_gather == "bf16" else None
        try:
            parallel.shard_(method, backbones.blocks(method), device, copies=cfg.speed.fsdp_copies, gather=gather)
        except ValueError as error:
            raise config.UsageError(f"speed.fsdp_copies: {error}") from None
    if cfg.speed.compiles_on(device.type):
        # Compiling in place and before DDP gives one graph and clean state-dict names. FSDP gathers weights between
        # blocks, so each block becomes a graph of its own.
        parallel.compile_(backbones.blocks(method) if sharded else [method])
    optimizer = optim.build(cfg.optim, method)
    training_step = TrainingStep(
        method,
        optimizer,
        model=parallel.data_parallel(method, device) if world_size > 1 and not sharded else None,
        accumulate=cfg.speed.accumulate,
        amp_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.speed.precision_on(device.type)),
        clip=cfg.optim.clip,
    )
    if cfg.dry_run:
        cost.dry_run(training_step, recipe, micro_batch, device, estimate.flops_per_image)
        return Result(settings.out, "done", 0, 0, {})

    # ---------------------------------------------------------------- data
    try:
        shards = ShardSet(cfg.shards or demo.shards(), cache=cfg.cache.folder, cache_size=cfg.cache.size)
        if cfg.only:
            shards = shards.only(config.names_in(cfg.only))
        if len(shards) < world_size * micro_batch:
            few = f"batch_size {cfg.batch_size} is more than the {len(shards):,} images there are"
            raise ValueError(f"{few}: lower it, or raise speed.accumulate")
        settings_of_rank: dict[str, Any] = {"device": device, "rank": rank, "world_size": world_size, **vars(cfg.data)}
        loader = Loader(shards, recipe, micro_batch, seed=cfg.seed, **settings_of_rank)
        with parallel.agreed():
            probe = Probe(cfg.probe, method.mean, method.std, str(device)) if is_main and cfg.probe.train else None
            segments = is_main and cfg.probe.segment_train is not None
            monitor = Monitor(cfg.probe, method.mean, method.std, str(device)) if segments else None
    except (OSError, ValueError) as error:  # ReadError and ShardError among them
        raise config.UsageError(str(error)) from None
    steps_per_epoch = len(loader) / cfg.speed.accumulate
    total = cfg.steps or max(1, round(cfg.epochs * steps_per_epoch))
    schedule = schedules.of(cfg.optim, cfg.batch_size, steps_per_epoch, total)

    # ---------------------------------------------------------------- resume
    start, log, writer = resume(settings, changes, training_step, loader), None, None
    with parallel.agreed():
        if out:
            log = metrics.Log(out.path, start, total, cfg.log, method.headline_metrics, settings.text)
            out.write_config(settings.text)
    if out:
        writer = checkpoint.Writer(out.path / "checkpoints", cfg.log.keep_last, cfg.log.keep_every)
        out.at_exit(writer.wait)
        out.total = total
        out.status("running", start)
        facts = describe(cfg, training_step, shards, loader, estimate, range(start, total))
        place = f"to {out.path}/" + (f", resuming from step {start:,}" if start else "")
        print(*changes, *facts, place, sep="\n", flush=True)

    # ---------------------------------------------------------------- loop
    interrupt = Interrupt(cfg.stop_after)
    guard = optim.Guard(settings.out, cfg.optim.max_skipped)
    profile = metrics.Profile(settings.out) if cfg.log.profile and is_main else None
    meter, clock, network = metrics.Meter(), metrics.Clock(cfg.batch_size, world_size), metrics.Network(shards)
    progress, peak_flops = torch.zeros((), device=device), cost.peak_flops(device)
    feed = Feed(loader, cfg.speed.accumulate, cfg.patience, interrupt.stop)
    epoch, lr, stopped, outage, began = 0, 0.0, False, None, time.monotonic()
    bad: dict[int, str] = {}  # bad samples found by any rank until the last log line
    record: dict[str, Any] = {}
    for done in itertools.count(start):  # number of steps done so far
        position = loader.state_dict()
        if done < total:
            with clock.waiting(), span("data"):
                taken = feed(ends=outage is not None, may_stop=done > start)
            stopped, outage = not taken, outage or feed.failure
        ends = stopped or done >= total
        if done > start and (ends or done % cfg.log.every == 0):
            means = meter.fetch("grad_norm")  # the host waits for the device only here and at checkpoints
            guard.check(done, shards.key)
            record = {"step": done, "epoch": epoch, **means, "lr": lr, "weight_decay": cfg.optim.weight_decay}
            record |= clock.rates() | {"memory_gb": metrics.memory_gb(device)}
            try:
                if parallel.any_rank(len(loader.bad) > len(bad)):
                    loader.add_bad(bad := parallel.merged(loader.bad))
            except ShardError as error:
                outage = error
            record |= {"skipped": guard.skipped, "bad_samples": len(bad)}
            record |= network.since_last_line(clock.elapsed())
            if peak_flops and estimate.flops_per_image:
                record["mfu"] = record["images_per_s_rank"] * estimate.flops_per_image / peak_flops
            record |= {name: value.item() for name, value in method.scheduled(progress).items()}
            period, last_line = cfg.probe.every * steps_per_epoch, (done - 1) // cfg.log.every * cfg.log.every
            due = not stopped and (done == total or done // period > last_line // period)
            try:
                if log and due:
                    record |= scores(probe, monitor, method, log, done)
            except ReadError as error:  # the run stops after the next step, when `feed` informs the other ranks
                outage = error
            if log and out:
                log.line(record)
                out.status("running", done)
            clock.restart()
        if done > start and (ends or done % cfg.log.checkpoint_every == 0):
            with clock.paused(device):
                payload = checkpoint.state(method, optimizer)  # collective: every rank takes part
                payload |= {"step": done, "method": cfg.method, "config": settings.text, "loader": position}
                payload["scaler"] = training_step.scaler.state_dict()
                if writer and out:
                    writer.save(payload)
                    with informing("report"):
                        report.write(out.path, facts)
                del payload  # a copy of the whole state; the writer frees it once it is written
        if ends:
            break
        optim.set_lr(optimizer, lr := schedule(done))
        progress.fill_(done / total)
        if log:
            log.step(taken[0], done)
        # Seeding by step and rank makes drop-path and masks reproducible after a resume.
        torch.manual_seed(((cfg.seed * 1_000_003 + done) * 65_537 + rank) % 2**63)
        made = training_step(iter(taken), progress)
        meter.add(made.metrics)
        guard.add(made.finite, made.index)
        epoch = position["epoch"]
        clock.steps += 1
        if profile:
            profile.step()

    # ---------------------------------------------------------------- teardown
    kept = parallel.from_rank_0(writer.wait() if writer else True)
    stopped = stopped or outage is not None
    full = f"the last steps are not kept: make room for {settings.out}, and run it again"
    failure = full if not kept else str(outage) if isinstance(outage, ShardError) else None
    if outage and failure != str(outage):
        print(f"run.py: {outage}", file=sys.stderr)
    if log and out and not stopped and kept:
        with informing("picture of what was learned"):
            draw(out.path, next(loader.forever()).to(device), log, done)
    loader.close()
    result = Result(settings.out, "stopped" if stopped else "done", done, total, record)
    if log and out:
        log.close()
        out.status("failed" if failure else result.state, done)
        with informing("report"):
            report.write(out.path, facts)
        with informing("summary"):
            records = report.read_log(out.path / "log.jsonl")
            print(summary(out.path, result.state, records, time.monotonic() - began), flush=True)
    parallel.any_rank(False)  # a barrier: some launchers end all ranks when one exits
    parallel.disconnect()
    if failure:
        raise config.RunError(failure)
    return result


def scores(
    probe: "Probe | None", monitor: "Monitor | None", method: "Method", log: "metrics.Log", step: int
) -> dict[str, float]:
    """Run the probes, log the segmentation picture and return the scores. Raises ReadError.

    If a probe fails for another reason, a message is printed and its score is left out.
    """
    from pipeline import ReadError

    found: dict[str, float] = {}
    try:
        if probe:
            found["knn"] = probe(method.backbone())
        if monitor:
            found["segment_miou"], panels = monitor(method.backbone())
            log.picture("segmentation", panels, step)
    except ReadError:
        raise
    except Exception as error:  # out of memory, for example
        print(f"run.py: no score at step {step}: {' '.join(str(error).split())}", file=sys.stderr)
    return found


def describe(
    cfg: config.Run, step: "TrainingStep", shards: "ShardSet", loader: "Loader", estimate: "cost.Estimate", steps: range
) -> list[str]:
    """Return the lines to print before training: the run in figures, and warnings. `steps` is the range still to do."""
    from pipeline import host
    from trainer import cost, parallel

    ranks, here = parallel.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device, epoch = loader.device, len(loader) / cfg.speed.accumulate
    compiled = cfg.speed.compiles_on(device.type)
    lines = [
        f"{cfg.method}: {sum(p.numel() for p in step.trainable):,} trainable parameters, "
        f"{estimate.flops_per_image / 1e9:.3g} GFLOP an image, {cfg.speed.precision_on(device.type)}, "
        f"{'not ' * (not compiled)}compiled, {ranks} x {parallel.name(device)}, {host.cores()} cores, "
        f"{loader.num_threads} decoder threads each",
        f"{len(shards):,} images, batch {cfg.batch_size} = {ranks} rank{'s' * (ranks > 1)} x {cfg.speed.accumulate} x "
        f"{loader.batch_size}, {epoch:g} steps an epoch, {len(steps):,} to go",
    ]
    if here * loader.num_threads > host.cores():
        shared = f"{here} rank{'s' * (here > 1)} x {loader.num_threads} decoding threads share {host.cores()} cores"
        lines.append(f"{shared}: give the job more cores, or lower data.num_threads")
    if steps.start == 0 and (warmup := cfg.optim.warmup_epochs * epoch) > steps.stop / 2:
        rises = f"the learning rate rises for {warmup:,.0f} steps, and there are {steps.stop:,}"
        lines.append(f"{rises}: lower optim.warmup_epochs for so short a run")
    if device.type == "cpu":
        lines += cost.too_long(estimate, cfg.batch_size * len(steps), here, config.small(cfg.method))
    if compiled:
        lines.append("the first step compiles the model: minutes for a large one")
    return lines


def resume(settings: config.Settings, changes: list[str], step: "TrainingStep", loader: "Loader") -> int:
    """Restore the newest checkpoint and return its step. Without a checkpoint, load the weights of `init` and return 0.

    Raises UsageError if the checkpoint or the weights do not fit. `changes` lists the settings that differ from those
    of the earlier run; it becomes part of the message.
    """
    from trainer import checkpoint

    cfg = settings.run
    try:
        if saved := checkpoint.resume(settings.out / "checkpoints", cfg.method, step.method, step.optimizer):
            if saved["scaler"]:  # empty where the run was not in fp16
                step.scaler.load_state_dict(saved["scaler"])
            loader.load_state_dict(saved["loader"])
            return saved["step"]
    except ValueError as error:
        reasons = "; ".join([str(error), *changes])
        raise config.UsageError(f"--out {settings.out}: cannot resume: {reasons}; name another folder") from None
    if cfg.init:
        try:
            checkpoint.set_weights(step.method, checkpoint.load(Path(cfg.init)))
        except ValueError as error:
            raise config.UsageError(f"--init {cfg.init}: {error}") from None
    return 0


def draw(out: Path, batch: "Batch", log: "metrics.Log", step: int) -> None:
    """Draw what was learned. The method is restored from the last checkpoint in `out`, as a user would load it."""
    import numpy as np
    from PIL import Image

    from trainer import checkpoint

    method = checkpoint.restore(checkpoint.load(out)).to(batch.label.device).eval()
    if method.picture(batch, out / "placements.png"):
        log.picture("placements", np.asarray(Image.open(out / "placements.png")), step)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except (config.UsageError, config.RunError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        code = 2 if isinstance(error, config.UsageError) else 1
    raise SystemExit(code)
