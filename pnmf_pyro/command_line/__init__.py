"""The commands of pnmf-pyro, one in each file; `options` has what they share.

It imports from every other room. Begin with :mod:`~pnmf_pyro.command_line.cli`.
"""
