"""Measurements of pnmf_pyro against its peers: python -m benchmarks NAME."""
