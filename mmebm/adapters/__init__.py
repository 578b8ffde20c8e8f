"""Our samplers in other libraries' slots. Importing this package imports none of them.

mmebm.adapters.torchebm.LangevinDynamics     a torchebm sampler, for its losses        pip install 'mmebm[peers]'
mmebm.adapters.ebmkit.LangevinDynamics       an ebmkit sampler, for its losses          pip install 'mmebm[peers]'
mmebm.adapters.multivae.EBMSampler           an EBM over a MultiVae model's latents    pip install 'mmebm[multivae]'
"""
