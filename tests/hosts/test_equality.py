"""Loss, gradients and ten training steps: one device, eight, and several processes agree."""

from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("equality.py")

ALGORITHMS = {
    "text": "dpo,ppo,reward,grpo",
    "image": "dpo,ppo,reward,grpo",
    "video": "dpo,grpo",
    "audio": "dpo,reward",
}


def run(start, out, medium, algorithms, meshes, processes, devices):
    with start([PROGRAM, out, medium, algorithms, meshes], processes, devices) as job:
        assert job.wait(timeout=1500) == 0, job.text[-3000:]
    with np.load(out) as found:
        return {name: found[name] for name in found.files}


def assert_equal(reference, found, name, mesh):
    """Relative to each array's largest value, and to the largest of all gradients: 1e-5."""
    one = {k.split("|")[2]: x for k, x in reference.items() if k.startswith(f"{name}|one|")}
    other = {k.split("|")[2]: x for k, x in found.items() if k.startswith(f"{name}|{mesh}|")}
    assert one.keys() == other.keys() and len(one) > 10
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other["grad_norm"][0], one["grad_norm"][0], rtol=1e-5)
    most = 1e-5 * one["grad_norm"].max()
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], atol=most, rtol=0)
    assert np.abs(np.diff(one["loss"])).max() > 1e-3  # it does train
    largest = max(np.abs(x).max() for k, x in one.items() if k.startswith("grad/"))
    for key, x in one.items():
        scale = largest if key.startswith("grad/") else max(np.abs(x).max(), 1.0)
        worst = np.abs(other[key] - x).max()
        assert worst <= 1e-5 * scale, f"{name} on {mesh}: {key} differs by {worst:.2e} of {scale}"


@pytest.mark.slow
@pytest.mark.parametrize("medium", ALGORITHMS)
def test_meshes_and_processes_agree(medium, start, tmp_path):
    names = ALGORITHMS[medium]
    meshes = "one tensor=2,fsdp=4 data=2,fsdp=1,tensor=2,seq=2"
    meshes += " fsdp=8 seq=2,data=4" if medium == "text" else ""
    alone = run(start, tmp_path / "1.npz", medium, names, meshes, processes=1, devices=8)
    for name in names.split(","):
        for mesh in meshes.split()[1:]:
            assert_equal(alone, alone, name, mesh)
    for processes, meshes in ((2, "tensor=2,fsdp=2"), (4, "data=2,fsdp=2")):
        found = run(
            start, tmp_path / f"{processes}.npz", medium, names, meshes, processes, 4 // processes
        )
        for name in names.split(","):
            for mesh in meshes.split():
                assert_equal(alone, found, name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_devices_of_two_processes_share_rows(processes, start, tmp_path):
    """Tensors and sequences split across processes: both make the same rows."""
    alone = run(start, tmp_path / "1.npz", "image", "dpo", "one", processes=1, devices=1)
    meshes = "tensor=2,data=1 seq=2,data=1" if processes == 2 else "tensor=2,data=2 seq=2,fsdp=2"
    found = run(start, tmp_path / "n.npz", "image", "dpo", meshes, processes, devices=1)
    for mesh in meshes.split():
        assert_equal(alone, found, "dpo", mesh)
