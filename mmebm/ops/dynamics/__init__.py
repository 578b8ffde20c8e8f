"""The steps of HMC, Underdamped and tempering, and the Metropolis test of the Langevin step."""

from mmebm.ops.dynamics.cpp import *  # noqa: F403
