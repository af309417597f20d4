"""Packages are listed by hand: ``kernels/`` is installed as ``aa_jax.kernels``, never as a
top-level ``kernels`` (that name belongs to another project's package)."""

from setuptools import find_packages, setup

PACKAGES = (
    find_packages(include=["aa_jax", "aa_jax.*"], exclude=["aa_jax.kernels", "aa_jax.kernels.*"])
    + ["aa_jax.kernels"]
    + ["aa_jax.kernels." + name for name in find_packages("kernels")]
)

setup(
    packages=PACKAGES,
    package_dir={"aa_jax.kernels": "kernels"},
)
