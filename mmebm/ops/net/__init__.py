"""Energies that are networks with convolutions: ``net_energy`` and ``langevin_net``, one call each."""
