"""Any data set: the method with nothing in it of the demo's data; latent and weights follow from the shapes.

The prior of the latent is an energy: a mixture and a contrastive term were measured on sets of ten balanced classes
only, and the term's weight goes with the size of the bound (5 on `digits`, 60 on five images of 14x14).
What the demo's numbers were measured on is the demo's data (docs/your-data.md says which to turn first).
"""

import dataclasses

from mmebm.training.config import Config, DataConfig, ValidationConfig
from mmebm.training.presets import demo


def config() -> Config:
    """`mmebm train --preset base --data NAME` runs this, and a configuration file that names no preset begins so."""
    small = demo.energy_prior()
    return small.replace(
        preset="base",
        data=DataConfig(),
        model=dataclasses.replace(small.model, latent="auto", weights="auto"),
        # labels to judge by may be missing: a twentieth of the tuples tells how it goes
        validation=ValidationConfig(every=500, share=0.05),
    )
