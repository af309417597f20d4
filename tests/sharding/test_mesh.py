"""The device mesh: sizes, order, and errors that name the numbers."""

import jax
import pytest
from jax.sharding import AxisType

from aa_jax.errors import ConfigError
from aa_jax.sharding import batch_devices, make_mesh


def test_fills_the_free_size_and_uses_auto_axes():
    mesh = make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "seq": 1, "expert": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_devices(mesh) == 4
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_some_devices_only():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh.size == 1 and batch_devices(mesh) == 1
    assert make_mesh(data=1, fsdp=-1).shape["fsdp"] == 8


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"tensor": 3}, ["8 devices", "tensor=3", "divides 8"]),
        ({"data": 2, "fsdp": 2}, ["multiply to 4", "8 devices", "jax.devices()[:4]"]),
        ({"data": -1, "fsdp": -1}, ["at most one"]),
        ({"data": 0}, ["positive", "data=0"]),
    ],
)
def test_errors_name_the_sizes(sizes, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(**sizes)
    for word in words:
        assert word in str(error.value)
