"""Package metadata is in pyproject.toml; this file is the place where compiled kernels are declared."""

from setuptools import setup

setup()
