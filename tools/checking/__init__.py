"""The checks of `tools/gpu_check.py`, each a function that notes its figures in a Bench and fails by AssertionError.

bench      what a check works with
pictures   shards of made pictures
pixels     are the views those of the CPU, and do they stay so?
rates      how fast are the forms, and what do they take from a trainer?
steps      a method's step: graphs, time, memory, ranks; a short training; the marked tests
"""
