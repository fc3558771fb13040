"""Installs from pyproject.toml; the compiled extension will be driven from here."""

from setuptools import setup

setup()
