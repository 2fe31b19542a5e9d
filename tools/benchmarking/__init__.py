"""The parts of `bench_loader.py`: the machine, stages, sweeps, loaders to compare with, and the report."""
