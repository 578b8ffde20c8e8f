"""``langevin_step``: one update of all tensors of the state. One file per implementation, :mod:`.op` chooses."""

from mmebm.ops.langevin_step.op import *  # noqa: F403
