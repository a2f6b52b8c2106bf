"""Only for the native module: everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["dmh/native/build.py:ffibuilder"])
