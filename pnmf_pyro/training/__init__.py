"""How a model is trained: the loop, its steps, when it stops, what hyperparameters are learned.

It imports from `models` and the rooms above that. Begin with :mod:`~pnmf_pyro.training.loop`.
"""
