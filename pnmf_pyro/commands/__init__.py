"""The commands of pnmf-pyro, one in each file; `options` has what they share."""
