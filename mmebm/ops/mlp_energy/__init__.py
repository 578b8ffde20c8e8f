"""``mlp_energy``: energy and gradient of a sum of MLP terms. One file per implementation, :mod:`.op` chooses."""

from mmebm.ops.mlp_energy.op import *  # noqa: F403
