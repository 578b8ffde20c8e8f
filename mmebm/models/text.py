"""Deprecated: the text autoencoder is :mod:`mmebm.data.text_codec`. This name works until 0.2."""

import warnings

from mmebm.data.text_codec import *  # noqa: F403

warnings.warn(
    "mmebm.models.text is mmebm.data.text_codec; the old name goes with 0.2", DeprecationWarning, stacklevel=2
)
