"""aa_jax: align any-to-any models in JAX.

Importing the package starts nothing and loads nothing heavy; import the room you need, e.g.
``from aa_jax import models, objectives`` or ``from aa_jax.data import templates``.
"""

__version__ = "0.1.0"
