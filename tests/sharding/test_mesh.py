"""The device mesh: sizes, order, and errors that name the numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from aa_jax.errors import ConfigError
from aa_jax.sharding import AXES, batch_devices, make_mesh


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
        ({"tensor": 3}, ["8 devices", "tensor=3", "divides 8", "nearest that work: tensor=2 or 4"]),
        ({"data": 2, "fsdp": 2}, ["multiply to 4", "8 devices", "jax.devices()[:4]"]),
        ({"data": 2, "fsdp": 2}, ["data=4; fsdp=4; tensor=2; seq=2; expert=2"]),
        ({"fsdp": 3, "tensor": 2}, ["fsdp=2 or 4"]),
        ({"data": -1, "fsdp": -1}, ["at most one"]),
        ({"data": 0}, ["positive", "data=0"]),
    ],
)
def test_errors_name_the_sizes(sizes, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(**sizes)
    for word in words:
        assert word in str(error.value)


class Device:
    """A device of a job of several slices, as far as a layout cares."""

    platform, device_kind = "cpu", "mock"

    def __init__(self, number, per_slice, slices=True):
        self.id, self.process_index = number, number // per_slice
        if slices:
            self.slice_index = number // per_slice

    def __repr__(self):
        return f"{self.id}"


def slices_of(mesh, axis):
    """The process (one per slice) of every device along an axis, the others at 0."""
    devices = np.moveaxis(mesh.devices, AXES.index(axis), 0).reshape(mesh.shape[axis], -1)
    return [device.process_index for device in devices[:, 0]]


@pytest.mark.parametrize("slices", [True, False])
def test_several_slices_keep_the_talkative_axes_inside(slices):
    """Two slices (or machines) of eight: replicas are apart, what shares weights is together."""
    devices = [Device(i, 8, slices) for i in range(16)]
    mesh = make_mesh(data=4, fsdp=2, tensor=2, dcn={"data": 2}, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2, "seq": 1, "expert": 1}
    assert slices_of(mesh, "data") == [0, 0, 1, 1]
    for axis in ("fsdp", "tensor"):
        assert len(set(slices_of(mesh, axis))) == 1
    assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
    assert set(mesh.axis_types) == {AxisType.Auto}
    both = make_mesh(data=-1, fsdp=8, dcn={"fsdp": 2}, devices=devices)
    assert dict(both.shape)["data"] == 2 and slices_of(both, "fsdp") == [0] * 4 + [1] * 4
    four = [Device(i, 4, slices) for i in range(16)]
    mixed = make_mesh(data=4, fsdp=4, dcn={"data": 2, "fsdp": 2}, devices=four)
    assert len(set(slices_of(mixed, "data"))) == len(set(slices_of(mixed, "fsdp"))) == 2


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"data": 4, "fsdp": 4, "dcn": {"data": 3}}, ["dcn.data=3", "data=4", "1, 2, 4 slices"]),
        ({"fsdp": 16, "dcn": {"fsdp": 4}}, ["4 equal slices", "in 2 with 8, 8", "multiply to 2"]),
        ({"dcn": {"model": 2}}, ["'model'", "data, fsdp"]),
    ],
)
def test_layouts_that_do_not_fit_the_slices(sizes, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(**sizes, devices=[Device(i, 8) for i in range(16)])
    for word in words:
        assert word in str(error.value)


def test_every_process_takes_part(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 1 has no device in this mesh of 8"):
        make_mesh(devices=[Device(i, 8) for i in range(8)])
