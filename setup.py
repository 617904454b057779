"""Find the packages; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

# An installed package has experiments/ within it, where `config.find_experiment` finds it.
# lstm_jax/pretrained has no modules.
experiments = find_namespace_packages(include=["experiments*"], exclude=["*.__pycache__"])
setup(
    packages=[
        *find_packages(include=["lstm_jax*"]),
        *(f"lstm_jax.{name}" for name in ["pretrained", *experiments]),
    ],
    package_dir={"lstm_jax.experiments": "experiments"},
)
