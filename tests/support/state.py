"""Seeds of one's own, and what a fit may neither read nor move."""

from contextlib import AbstractContextManager

import numpy as np
import pyro
import torch

from pnmf_pyro.data.random_state import drawing_from


def drawing(seed: int) -> AbstractContextManager[None]:
    """Draws inside come from this seed."""
    return drawing_from(torch.Generator().manual_seed(seed), torch.device("cpu"))


def global_state() -> dict:
    """Seeds, stores and settings of numpy, torch and Pyro."""
    numpy_state = np.random.get_state()  # noqa: NPY002 - that it does not move is the point
    store = pyro.get_param_store()
    return {
        "torch generator": torch.random.get_rng_state().tolist(),
        "numpy generator": [numpy_state[1].tolist(), *numpy_state[2:]],
        "parameter store": {name: value.tolist() for name, value in store.items()},
        "store object": id(store),
        "default type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "pyro": pyro.settings.get(),  # validation flags, and whether parameters are local
        "validation": torch.distributions.Distribution._validate_args,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }
