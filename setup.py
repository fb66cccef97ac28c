from setuptools import setup

setup(cffi_modules=["native/build.py:ffibuilder"])  # the one thing pyproject.toml cannot say
