"""Threads: two cores are shared by the tests, DALI and torch; more threads than cores only wait for each other."""

import torch

torch.set_num_threads(2)
