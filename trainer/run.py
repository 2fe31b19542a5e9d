"""Pretrains a backbone. Reads top to bottom: who am I, what is learnt, from what, where were we, the loop, goodbye.

    torchrun trainer/run.py --method loca                                            bundled photographs, minutes
    torchrun --nproc_per_node=8 trainer/run.py --method loca --shards DIR --out runs/loca
    python trainer/run.py --method loca --help                                       every setting

The same command again goes on from its last checkpoint. Exit codes: 0 done, 2 usage, 75 stopped by a signal or a time
limit after writing a checkpoint.
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout; not trainer/, whose names are not top-level ones

from trainer import config  # noqa: E402 - after the line above; everything heavy waits until the options are parsed

EX_TEMPFAIL = 75


def main(argv: list[str]) -> int:
    settings = config.parse(argv)
    cfg = settings.run

    import itertools
    import os
    from contextlib import nullcontext

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from pipeline import Loader, ShardError, ShardSet
    from trainer import checkpoint, demo, methods, metrics, optim, parallel, schedules, visualise
    from trainer.interrupt import Interrupt

    # ---------------------------------------------------------------- who am I
    local_rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.benchmark = True  # shapes never change
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = parallel.rank()
    chief = rank == 0
    if cfg.batch_size % world:
        raise config.UsageError(f"batch_size {cfg.batch_size} does not divide among {world} ranks: make it a multiple")
    precision = cfg.speed.precision if cfg.speed.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    compiled = cfg.speed.compile == "on" or (cfg.speed.compile == "auto" and device.type == "cuda")

    # ---------------------------------------------------------------- what is learnt
    room = methods.load(cfg.method)
    method_config = room.Config(**vars(settings.method))
    torch.manual_seed(cfg.seed)
    method = room.Method(method_config).to(device)
    optimizer = optim.build(cfg.optim, method)
    learnt = [p for p in method.parameters() if p.requires_grad]
    if compiled:
        method.compile(dynamic=False)  # in place and before DDP: one graph, clean names
    step_fn = DistributedDataParallel(method) if world > 1 else method
    autocast = {"fp32": nullcontext, "bf16": lambda: torch.autocast(device.type, torch.bfloat16)}.get(
        precision, lambda: torch.autocast(device.type, torch.float16)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # ---------------------------------------------------------------- from what
    try:
        if cfg.shards is None and chief:
            demo.shards()
        if world > 1:
            dist.barrier()
        shards = ShardSet(cfg.shards or demo.shards())
        loader = Loader(
            shards,
            room.views(method_config),
            cfg.batch_size // world,
            device=str(device),
            seed=cfg.seed,
            rank=rank,
            world_size=world,
            num_threads=cfg.data.threads,
            order=cfg.data.order,
            max_bad=cfg.data.max_bad,
        )
    except ShardError as error:
        raise config.UsageError(str(error)) from None
    steps_per_epoch = len(loader)
    total = cfg.steps or round(cfg.epochs * steps_per_epoch)
    warmup = round(cfg.optim.warmup_epochs * steps_per_epoch)
    peak = cfg.optim.lr * cfg.batch_size / cfg.optim.lr_batch

    # ---------------------------------------------------------------- where were we
    out = settings.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        if chief:
            (out / "config.yaml").write_text(settings.text, encoding="utf-8")
    except OSError as error:
        raise config.UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    start = 0
    if (saved := checkpoint.latest(out / "checkpoints")) is not None:
        if saved["method"] != cfg.method:
            raise config.UsageError(f"--out {out}: holds a run of {saved['method']!r}; name another folder")
        method.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        try:
            loader.load_state_dict(saved["loader"])
        except ValueError as error:
            raise config.UsageError(f"--out {out}: cannot go on: {error}") from None
        start = saved["step"]
    interrupt = Interrupt(cfg.stop_after)
    log = metrics.Log(out, start, total, tensorboard=cfg.log.tensorboard, wandb=cfg.log.wandb) if chief else None
    if chief:
        weights = sum(p.numel() for p in learnt)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            f"{cfg.method}: {weights:,} weights, {precision}{', compiled' if compiled else ''}, {world} x {name}, "
            f"{len(os.sched_getaffinity(0))} cores allowed\n"
            f"{len(shards):,} images, batch {cfg.batch_size} = {world} x {cfg.batch_size // world}, "
            f"{steps_per_epoch} steps an epoch, {total:,} in all"
            + (f", going on from step {start:,}" if start else "")
            + f"; {out}/",
            flush=True,
        )

    def save(step: int) -> None:
        if chief:
            payload = {
                "step": step,
                "method": cfg.method,
                "config": settings.text,
                "model": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "loader": loader.state_dict(),
            }
            checkpoint.save(out / "checkpoints", payload, keep_last=cfg.log.keep_last, keep_every=cfg.log.keep_every)

    # ---------------------------------------------------------------- the loop
    meter = metrics.Meter()
    guard = optim.Guard(out, cfg.optim.max_skipped)
    progress = torch.zeros((), device=device)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    clock, waited, seen = time.perf_counter(), 0.0, 0
    stopped = False
    for step in range(start, total):
        t = time.perf_counter()
        batch = next(batches).to(device)
        waited += time.perf_counter() - t

        lr = schedules.warmup_cosine(step, total=total, warmup=warmup, peak=peak, final=cfg.optim.final_lr * peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        progress.fill_(step / total)
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 65_537 + rank)  # drop-path and masks: a function of the step
        with autocast():
            loss, parts = step_fn(batch, progress)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = optim.clip_(learnt, cfg.optim.clip)
        finite = torch.isfinite(norm) & torch.isfinite(parallel.mean_over_ranks(loss.detach()))
        optim.step(optimizer, finite, scaler)
        optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
        meter.add({"loss": loss, **parts, "grad_norm": norm})
        guard.add(finite, batch.index)
        seen += 1

        done = step + 1
        last = done == total
        stopped = interrupt.stop() and not last
        if last or stopped or done % cfg.log.every == 0:
            means = meter.fetch()  # the host waits for the device here
            guard.check(done, shards.key)
            elapsed = time.perf_counter() - clock
            if log:
                rate = seen * cfg.batch_size / elapsed
                log.line(
                    {
                        "step": done,
                        "epoch": loader.epoch,
                        **means,
                        "lr": lr,
                        "images_per_s": rate,
                        "images_per_s_rank": rate / world,
                        "step_ms": 1e3 * elapsed / seen,
                        "data_wait_ms": 1e3 * waited / seen,
                        "memory_gb": metrics.memory_gb(device),
                        "skipped": guard.skipped,
                        "bad_samples": len(loader.bad),
                    }
                )
        if last or stopped or done % cfg.log.checkpoint_every == 0:
            save(done)
        if last or stopped or done % cfg.log.every == 0:
            clock, waited, seen = time.perf_counter(), 0.0, 0  # the clock stands still for checkpoints
        if stopped:
            break

    # ---------------------------------------------------------------- goodbye
    if chief and not stopped and hasattr(method, "place"):
        visualise.placements(out / "placements.png", method, next(batches).to(device))
        print(f"where the model places the query patches: {out / 'placements.png'}")
    loader.close()
    if log:
        log.close()
    if world > 1:
        dist.destroy_process_group()
    return EX_TEMPFAIL if stopped else 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except config.UsageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
