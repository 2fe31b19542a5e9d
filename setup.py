"""Installs `pipeline` (the input pipeline) and `trainer` (the training loop and its methods); see pyproject.toml."""

from setuptools import setup

setup()
