"""The commands of pnmf-pyro, one in each file; `parsers` has their arguments, `options` reads them.

It imports from every other room. Begin with :mod:`~pnmf_pyro.command_line.cli`.
"""
