"""Pretrains a backbone. Reads top to bottom: who am I, what is learnt, from what, where were we, the loop, goodbye.

    torchrun trainer/run.py --method loca                                            bundled photographs, minutes
    torchrun --nproc_per_node=8 trainer/run.py --method loca --shards DIR --out runs/loca
    python trainer/run.py --method loca --help                                       every setting

The same command again goes on from its last checkpoint. Exit codes: 0 done, 2 usage, 75 stopped by a signal or a time
limit after writing a checkpoint, 1 failed: what was learnt until the last checkpoint is there.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout; not trainer/, whose names are not top-level ones

from trainer import config  # noqa: E402 - after the line above

STOPPED = 75  # EX_TEMPFAIL: run it again to go on


def main(argv: list[str]) -> int:
    # Threads that wait for each other by spinning stop a shared CPU: measured on two cores with a busy neighbour, 6
    # images/s against 61 asleep; alone, 117 against 105. To be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    settings = config.parse(argv)
    cfg, out = settings.run, settings.out

    import torch
    import torch.distributed as dist

    from pipeline import Loader, ReadError, ShardSet, cores
    from trainer import backbones, checkpoint, cost, demo, methods, metrics, optim, parallel, schedules
    from trainer.evaluate import Probe
    from trainer.interrupt import Interrupt
    from trainer.method import Method
    from trainer.segmentation.monitor import Monitor
    from trainer.step import TrainingStep

    # ---------------------------------------------------------------- who am I
    local_rank, here, world = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"), ("WORLD_SIZE", "1"))
    )
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Autocast takes the heavy products; what it leaves in fp32 are small differences in losses. TF32 loses those.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = True  # shapes never change
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # ranks wait while the first one probes
    rank = parallel.rank()
    chief = rank == 0
    slices = world * cfg.speed.accumulate
    if cfg.batch_size % slices:
        raise config.UsageError(
            f"batch_size {cfg.batch_size} does not divide among {world} ranks x {cfg.speed.accumulate} slices: "
            f"make it a multiple of {slices}"
        )
    precision = cfg.speed.precision if cfg.speed.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    compiled = cfg.speed.compile == "on" or (cfg.speed.compile == "auto" and device.type == "cuda")

    # ---------------------------------------------------------------- what is learnt
    room = methods.load(cfg.method)
    torch.manual_seed(cfg.seed)
    try:
        method_config = room.Config(**vars(settings.method))
        recipe = room.views(method_config)
        method: Method = room.Method(method_config).to(device)
    except ValueError as error:
        raise config.UsageError(f"--{cfg.method}: {error}") from None
    per_image = cost.flops_per_image(method, recipe)
    if cfg.speed.recompute:
        backbones.recompute_(method)
    if sharded := cfg.speed.parallel == "fsdp" and world > 1:
        parallel.shard_(method, backbones.blocks(method))
    if compiled:  # in place and before DDP: one graph, clean names. FSDP works between the blocks: a graph each
        for unit in backbones.blocks(method) if sharded else [method]:
            unit.compile(dynamic=False)
    optimizer = optim.build(cfg.optim, method)
    training_step = TrainingStep(
        method,
        optimizer,
        model=parallel.data_parallel(method, device) if world > 1 and not sharded else None,
        accumulate=cfg.speed.accumulate,
        amp_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision),
        clip=cfg.optim.clip,
    )
    if cfg.dry_run:
        told = cost.dry_run(training_step, recipe, cfg.batch_size // slices, device, per_image)
        if chief:
            print(told)
        return 0

    # ---------------------------------------------------------------- from what
    try:
        if cfg.shards is None and chief:
            demo.shards()
        if world > 1:
            dist.barrier()
        shards = ShardSet(cfg.shards or demo.shards(), cache=cfg.cache.folder, cache_size=cfg.cache.size)
        loader = Loader(
            shards,
            recipe,
            cfg.batch_size // slices,
            device=str(device),
            seed=cfg.seed,
            rank=rank,
            world_size=world,
            num_threads=cfg.data.threads,
            order=cfg.data.order,
            max_bad=cfg.data.max_bad,
            prefetch=cfg.data.prefetch,
            hw_decoder_load=cfg.data.hw_decoder_load,
            form=cfg.data.form,
        )
        probe = Probe(cfg.probe, method.mean, method.std, str(device)) if chief and cfg.probe.train else None
        segments = chief and cfg.probe.segment_train is not None
        monitor = Monitor(cfg.probe, method.mean, method.std, str(device)) if segments else None
    except (ValueError, ReadError) as error:  # ShardError among them
        raise config.UsageError(str(error)) from None
    steps_per_epoch = len(loader) / cfg.speed.accumulate
    total = cfg.steps or round(cfg.epochs * steps_per_epoch)
    warmup = round(cfg.optim.warmup_epochs * steps_per_epoch)
    peak = cfg.optim.lr * cfg.batch_size / cfg.optim.lr_batch

    # ---------------------------------------------------------------- where were we
    start = 0
    try:
        saved = checkpoint.latest(out / "checkpoints")
    except ValueError as error:
        raise config.UsageError(f"--out {out}: {error}") from None
    if saved is not None:
        if saved["method"] != cfg.method:
            raise config.UsageError(f"--out {out}: holds a run of {saved['method']!r}; name another folder")
        try:
            checkpoint.set_state(method, optimizer, saved)
            training_step.scaler.load_state_dict(saved["scaler"])
            loader.load_state_dict(saved["loader"])
        except (KeyError, RuntimeError, ValueError) as error:
            lacks = "it lacks " * isinstance(error, KeyError)
            reason = lacks + " ".join(str(error).split())[:300]
            raise config.UsageError(f"--out {out}: cannot go on from its checkpoint: {reason}") from None
        start = saved["step"]
    elif cfg.init:
        try:
            checkpoint.set_weights(method, checkpoint.load(Path(cfg.init)))
        except ValueError as error:
            raise config.UsageError(f"--init {cfg.init}: {' '.join(str(error).split())[:300]}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if chief:
            (out / "config.yaml").write_text(settings.text, encoding="utf-8")
    except OSError as error:
        raise config.UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    interrupt = Interrupt(cfg.stop_after)
    fastest = cost.peak_flops(device)
    if chief:
        allowed, threads = cores(), loader.num_threads
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            f"{cfg.method}: {sum(p.numel() for p in training_step.trainable):,} trainable parameters, "
            f"{per_image / 1e9:.3g} GFLOP an image, {precision}, "
            f"{'compiled' if compiled else 'not compiled'}, {world} x {name}, {allowed} cores, "
            f"{threads} decoding threads a rank\n"
            f"{len(shards):,} images, batch {cfg.batch_size} = {world} ranks x {cfg.speed.accumulate} x "
            f"{cfg.batch_size // slices}, {steps_per_epoch:g} steps an epoch, {total:,} in all"
            + (f", going on from step {start:,}" if start else "")
            + f"; {out}/",
            flush=True,
        )
        if here * threads > allowed:
            shared = f"{here} ranks x {threads} decoding threads share {allowed} cores"
            print(f"{shared}: give the job more, or set data.threads")

    log = metrics.Log(out, start, total, tensorboard=cfg.log.tensorboard, wandb=cfg.log.wandb) if chief else None

    def save(step: int) -> bool:
        payload = checkpoint.state(method, optimizer)  # on every rank: shards are gathered
        if chief:
            payload |= {
                "step": step,
                "method": cfg.method,
                "config": settings.text,
                "scaler": training_step.scaler.state_dict(),
                "loader": loader.state_dict(),
            }
            folder, last, each = out / "checkpoints", cfg.log.keep_last, cfg.log.keep_every
            return checkpoint.save(folder, payload, keep_last=last, keep_every=each)
        return True

    def score_due(step: int) -> bool:
        """Whether the probe's turn came after the last line, or the run is at its end."""
        period, last_line = cfg.probe.every * steps_per_epoch, (step - 1) // cfg.log.every * cfg.log.every
        return step == total or step // period > last_line // period

    # ---------------------------------------------------------------- the loop
    meter, network = metrics.Meter(), metrics.Network(shards)
    guard = optim.Guard(out, cfg.optim.max_skipped)
    profile = metrics.Profile(out) if cfg.log.profile and chief else None
    progress = torch.zeros((), device=device)
    batches = metrics.Timed(loader.forever())
    clock, seen = time.perf_counter(), 0
    stopped, kept = False, True
    for step in range(start, total):
        lr = schedules.warmup_cosine(step, total=total, warmup=warmup, peak=peak, final=cfg.optim.final_lr * peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        progress.fill_(step / total)
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 65_537 + rank)  # drop-path and masks: a function of the step
        epoch = loader.epoch
        result = training_step(batches, progress)
        meter.add(result.metrics)
        guard.add(result.finite, result.index)
        seen += 1
        if profile:
            profile.step()

        done = step + 1
        stopped = interrupt.stop() and done < total
        if telling := stopped or done == total or done % cfg.log.every == 0:
            means = meter.fetch("grad_norm")  # the host waits for the device here, and only here
            guard.check(done, shards.key)
            elapsed = time.perf_counter() - clock
            rate = seen * cfg.batch_size / elapsed
            record = {
                "step": done,
                "epoch": epoch,
                **means,
                "lr": lr,
                "weight_decay": cfg.optim.weight_decay,
                "images_per_s": rate,
                "images_per_s_rank": rate / world,
                "step_ms": 1e3 * elapsed / seen,
                "data_wait_ms": 1e3 * batches.seconds / seen,
                "memory_gb": metrics.memory_gb(device),
                "skipped": guard.skipped,
                "bad_samples": len(loader.bad),
                **network.since_last_line(elapsed),
            }
            if fastest:
                record["mfu"] = rate / world * per_image / fastest
            record |= {name: value.item() for name, value in method.scheduled(progress).items()}
            if probe and not stopped and score_due(done):
                record["knn"] = probe(method.backbone())
            if monitor and log and not stopped and score_due(done):
                record["segment_miou"], panels = monitor(method.backbone())
                log.picture("segmentation", panels, done)
            if log:
                log.line(record)
        if stopped or done == total or done % cfg.log.checkpoint_every == 0:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what is still computed is no pause
            pause = time.perf_counter()
            kept = save(done)
            clock += time.perf_counter() - pause  # stands still for checkpoints
        if telling:
            clock, seen, batches.seconds = time.perf_counter(), 0, 0.0  # and for the probe
        if stopped:
            break

    # ---------------------------------------------------------------- goodbye
    if not kept:
        print(f"run.py: the last steps are not kept: make room for {out}, and run it again to do them", file=sys.stderr)
    elif chief and not stopped:
        learned = checkpoint.restore(checkpoint.load(out)).to(device).eval()  # as anyone will meet it
        if learned.picture(next(batches).to(device), picture := out / "placements.png"):
            print(f"a picture of what was learned: {picture}")
    loader.close()
    if log:
        log.close()
    if world > 1:
        dist.destroy_process_group()
    return 1 if not kept else STOPPED if stopped else 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except config.UsageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
