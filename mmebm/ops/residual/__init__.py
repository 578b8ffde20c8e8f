"""``residual``: value and gradient of likelihood terms. One file per implementation, :mod:`.op` chooses."""

from mmebm.ops.residual.op import *  # noqa: F403
