"""Installs `pipeline` (the input pipeline) and `trainer` (the training loop and its methods)."""

from setuptools import setup

setup(
    name="dense-ssl",
    version="0.1.0",
    description="Input pipeline and trainer for dense self-supervised learning: LOCA and VICRegL",
    python_requires=">=3.11",
    packages=["pipeline", "trainer", "trainer.methods", "trainer.presets"],
    package_data={"trainer.presets": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",  # timm imports it; it must be the build that matches torch
        "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
        "webdataset",
        "timm>=1.0.20",
        "numba>=0.61",
        "numpy",
        "pillow",
        "pyyaml",
        "jsonargparse[signatures]>=4.49",  # typed dataclasses <- YAML <- dotted overrides
        "safetensors",
        "msgpack",  # reads released flax checkpoints
        "scikit-image",  # brings the photographs that the default run trains on
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML"],
        "bench": ["matplotlib", "opencv-python-headless", "albumentations"],
        "wandb": ["wandb"],
    },
)
