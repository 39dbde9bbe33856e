"""A table of counts from a file, with what the file says of samples and features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.data.checks import some_of, warn
from pnmf_pyro.data.masks import hide
from pnmf_pyro.data.sparse_structure import checked_csr
from pnmf_pyro.estimator.anndata_bridge import found_places
from pnmf_pyro.estimator.results import SPATIAL_KEY

if TYPE_CHECKING:
    from anndata import AnnData

Matrix: TypeAlias = np.ndarray | sp.spmatrix | sp.sparray

# Rows or columns that a file may announce for each count that it holds.
LINES_A_COUNT = 1000

# Names of genes in the large databases, and of cells by their barcodes.
GENE = re.compile(r"(ENS[A-Z]{0,6}[GT]\d{6,}|FBgn\d{7}|WBGene\d{8}|AT[1-5CM]G\d{5})(\.\d+)?")
BARCODE = re.compile(r"[ACGT]{10,}(-\d+)?")

# What the names of features are called in the corner of a table.
FEATURE_WORDS = {
    *("gene", "genes", "geneid", "gene_id", "gene_name", "gene_symbol", "symbol", "ensgene"),
    *("feature", "feature_id", "otu", "otu id", "otu_id", "asv", "asv_id", "taxon", "taxa"),
}


@dataclass
class CountTable:
    """Counts X from a file, samples by features, with what the file says of them.

    Attributes
    ----------
    X : ndarray or sparse matrix of shape (n_samples, n_features)
        Counts.
    sample_names, feature_names : list of str, or None
        Names, where the file has them.
    annotation : AnnData, or None
        What an AnnData file holds of samples and features, without the counts.
    coordinates : ndarray of shape (n_samples, p), or None
        Places of the samples, where --coords names them.
    mask : ndarray of bool, shape (n_samples, n_features), or None
        True where an entry is observed. The counts are 0 where it is hidden.
    corner : str
        Heading of the names of samples.
    notes : list of str
        What was decided on the way, a line each.
    is_10x : bool
        Whether the file says itself which way round it is.
    """

    X: Matrix
    sample_names: list[str] | None = None
    feature_names: list[str] | None = None
    annotation: AnnData | None = None
    coordinates: np.ndarray | None = None
    mask: np.ndarray | None = None
    corner: str = ""
    notes: list[str] = field(default_factory=list)
    is_10x: bool = False

    @property
    def T(self) -> CountTable:
        """The same table with samples and features exchanged."""
        annotation = None if self.annotation is None else self.annotation.T
        names = self.feature_names, self.sample_names
        return CountTable(self.X.T, *names, annotation, notes=self.notes)

    def structured(self) -> CountTable:
        """Return the table; raise a ValueError for what is no table of numbers.

        Sparse counts become CSR, of a structure that fits their shape.
        """
        X = self.X
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"it must hold rows and columns; its shape is {X.shape}")
        if not isinstance(X, np.ndarray):
            check_claim(X.shape, X.nnz)
            X = checked_csr(X)
        if X.dtype.kind not in "biuf":
            raise ValueError(f"counts must be real numbers; it holds {X.dtype}")
        return replace(self, X=X)

    def checked(self) -> CountTable:
        """Return the table, structured; raise a ValueError for what are no counts."""
        table = self.structured()
        X = table.X
        if found := _wrong_count(X):
            row, column, value = found
            raise ValueError(
                f"counts must not be negative or missing; row {_label(row, self.sample_names)}, "
                f"column {_label(column, self.feature_names)} holds {value:g}. Give raw counts, "
                "not centred or log-transformed data, and leave out rows or columns with missing "
                "cells, or name what is observed by --mask"
            )
        for names, size in zip((self.sample_names, self.feature_names), X.shape, strict=True):
            if names is not None and len(names) != size:
                raise ValueError(f"it has {len(names)} names for {size} rows or columns")
        return table

    def with_coordinates(self, names: Sequence[str]) -> CountTable:
        """Return the table with these columns as coordinates of the samples.

        They are columns of obs in an AnnData file, which go to obsm["spatial"], and are taken out
        of the counts otherwise.
        """
        if self.annotation is not None:
            obs = self.annotation.obs
            _check_columns(names, list(obs))
            try:
                self.annotation.obsm[SPATIAL_KEY] = obs[list(names)].to_numpy(dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"--coords must name columns of numbers: {error}.") from error
            return self
        known = self.feature_names or []
        _check_columns(names, known)
        chosen = [known.index(name) for name in names]
        kept = np.setdiff1d(np.arange(len(known)), chosen)
        places = self.X[:, chosen]
        values = places if isinstance(places, np.ndarray) else places.toarray()
        return replace(
            self,
            X=self.X[:, kept],
            feature_names=[known[j] for j in kept],
            coordinates=np.asarray(values, dtype=np.float64),
        )

    def hiding(self, mask: CountTable) -> CountTable:
        """Return the table with what `mask` hides, 1 where an entry is observed and 0 elsewhere."""
        ours, theirs = self.feature_names, mask.feature_names
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                "--mask must have the features of COUNTS, in their order; its columns have other "
                f"names, {some_of(theirs)} where those of COUNTS are {some_of(ours)}."
            )
        X, hidden = hide(self.X, mask.X, told=False)
        seen = None if hidden is None else hidden.numpy().toarray() == 0
        return replace(self, X=X, mask=seen)

    def warn_turned(self) -> None:
        """Warn where names say that the samples are features, and of coordinates among counts."""
        rows, columns = self.sample_names or [], self.feature_names or []
        called = self.corner.strip().lower() in FEATURE_WORDS
        if called or _most(GENE, rows) or _most(BARCODE, columns):
            why = f"their heading is {self.corner!r}" if called else f"such as {some_of(rows[:2])}"
            warn(
                f"the samples have names of features ({why}). If the file is features by samples, "
                "give --transpose."
            )
        pair = found_places(columns)
        if pair and len(columns) > 2:
            warn(
                f"columns {pair[0]!r} and {pair[1]!r} are taken for features. If they are "
                f"coordinates, give --coords {','.join(pair)}."
            )


def check_claim(shape: Sequence[int], n_stored: int) -> None:
    """Raise a ValueError for a shape that the number of stored counts cannot fill."""
    rows, columns = map(int, shape)
    if min(rows, columns) < 0 or max(rows, columns) > LINES_A_COUNT * (n_stored + 1):
        raise ValueError(
            f"it claims to have {rows} rows and {columns} columns, and holds {n_stored} counts"
        )
    if n_stored > rows * columns:
        raise ValueError(f"it claims to have {n_stored} counts in {rows} x {columns} cells")


def _wrong_count(X: Matrix) -> tuple[int, int, float] | None:
    """Row, column and value of the first count that is negative or not finite."""
    entries = X if isinstance(X, np.ndarray) else X.data
    wrong = ~(np.isfinite(entries) & (entries >= 0))
    if not wrong.any():
        return None
    at = int(np.argmax(wrong))
    if isinstance(X, np.ndarray):
        row, column = divmod(at, X.shape[1])
    else:
        row, column = int(np.searchsorted(X.indptr, at, "right")) - 1, int(X.indices[at])
    return row, column, float(entries.flat[at])


def _check_columns(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if known.count(name) != 1:
            raise ValueError(
                f"--coords must name columns, such as x,y; {name!r} is there "
                f"{known.count(name)} times. The columns are {some_of(known) or 'without names'}."
            )


def _most(pattern: re.Pattern[str], names: Sequence[str]) -> bool:
    """Whether more than half of the names have a form; the first thousand are enough."""
    some = names[:1000]
    return sum(bool(pattern.fullmatch(name)) for name in some) * 2 > len(some)


def _label(number: int, names: list[str] | None) -> str:
    """Number of a row or column, counted from 1, and its name."""
    return str(number + 1) + (f" ({names[number]!r})" if names else "")
