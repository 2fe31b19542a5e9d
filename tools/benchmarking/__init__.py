"""What `bench_loader.py` measures with: the machine, stages, sweeps, rival loaders, and the report."""
