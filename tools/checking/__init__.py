"""The checks of `tools/gpu_check.py`: functions that note their figures in a Bench and fail by AssertionError.

bench      the shards, the device and the results file of a check
pictures   shards of generated pictures
pixels     do the views equal the CPU's, and do they stay valid?
rates      how fast are the forms, and how much do they slow a trainer?
steps      a method's step: graphs, time, memory, ranks; a short training; the marked tests
"""
