"""Several processes as one job: joining it, agreeing within it, starting it on one machine.

JAX's distributed runtime does the work; here is only how a process finds its place from the
environment (`join`), what processes say to each other outside the train step (`agree`), and a
supervisor for processes on one machine (`local`).
"""

from aa_jax.hosts.agree import barrier, count, first, gather, index, same, to_host, total
from aa_jax.hosts.join import LOST_A_PEER, explain, join, joined, leave, only_one, place

__all__ = [
    "LOST_A_PEER",
    "barrier",
    "count",
    "explain",
    "first",
    "gather",
    "index",
    "join",
    "joined",
    "leave",
    "only_one",
    "place",
    "same",
    "to_host",
    "total",
]
