"""``langevin_mlp``: a whole chain on a sum of MLP terms. One file per implementation, :mod:`.op` chooses."""

from mmebm.ops.langevin_mlp.op import *  # noqa: F403
