"""Where arrays live: the device mesh, the rule table, and batches spread over it."""

from aa_jax.sharding.batches import Share, batch_shardings, pad_rows, put_batch, rows, share
from aa_jax.sharding.mesh import AXES, batch_devices, make_mesh
from aa_jax.sharding.rules import RULES, constrain, optimizer_shardings, replicated, shardings

__all__ = [
    "AXES",
    "RULES",
    "Share",
    "batch_devices",
    "batch_shardings",
    "constrain",
    "make_mesh",
    "optimizer_shardings",
    "pad_rows",
    "put_batch",
    "replicated",
    "rows",
    "share",
    "shardings",
]
