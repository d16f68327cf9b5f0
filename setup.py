"""Setuptools' list of packages; everything else stands in setup.cfg."""

from setuptools import find_packages, setup

# presets and schemas are data of the package in folders of their own
DATA = ["mixedprec_plugin.configs", "mixedprec_plugin.schemas"]

setup(packages=[*find_packages(include=["mixedprec_plugin", "mixedprec_plugin.*"]), *DATA])
