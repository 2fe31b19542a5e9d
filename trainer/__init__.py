"""The trainer: `run.py` is the program; the rest are the rooms it walks through."""
