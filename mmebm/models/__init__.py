"""The networks of the paper's system: joint energy, shared generator, joint inference; and priors of the latent."""

from mmebm.models.generator import SharedGenerator
from mmebm.models.inference import Expert, JointInference
from mmebm.models.joint_energy import JointEnergy
from mmebm.models.latent_prior import (
    FlowPrior,
    GaussianPrior,
    LatentPrior,
    MixturePrior,
    OwnPrior,
    Prior,
    standard_normal,
)

__all__ = [
    "Expert",
    "FlowPrior",
    "GaussianPrior",
    "JointEnergy",
    "JointInference",
    "LatentPrior",
    "MixturePrior",
    "OwnPrior",
    "Prior",
    "SharedGenerator",
    "standard_normal",
]
