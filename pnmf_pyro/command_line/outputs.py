"""Results to files: where they may be written, and what is in them."""

from __future__ import annotations

import argparse
import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.data.atomic import replacing
from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.data.stores import is_zarr
from pnmf_pyro.estimator.anndata_bridge import (
    COLUMNS,
    AnnDataKeys,
    import_anndata,
    import_h5py,
    results,
    settings,
)
from pnmf_pyro.estimator.archive import write_archive
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.results import EFFECTS
from pnmf_pyro.estimator.stored_fit import write_fit

if TYPE_CHECKING:
    from anndata import AnnData

# Options that name files to read, and files to write.
READ = {
    **{"counts": "COUNTS", "model": "MODEL", "fit": "FIT", "mask": "--mask"},
    **{"batches": "--batches", "covariates": "--covariates"},
}
WRITTEN = {
    **{"out": "--out", "save_model": "--save-model", "report": "--report"},
    "checkpoint": "--checkpoint",
}

# Tables of CSV results, and what their rows are.
TABLES = {
    "factors": "sample",
    "factors_sd": "sample",
    "log_factors_sd": "sample",
    "loadings": "feature",
    "elbo_history": "step",
}
# Tables that only some fits have. A later fit without them removes those of an earlier one.
OPTIONAL = {**dict.fromkeys(EFFECTS, "feature"), "dispersion": "feature"}
STALE = [f"PNMF_{name}" for name in EFFECTS]  # in varm of an .h5ad file
ENDINGS = (".h5ad", ".npz", ".csv")
STORES = (".h5ad", ".zarr")


def check_clashes(options: argparse.Namespace) -> None:
    """Raise a ValueError where an output would overwrite an input or another output.

    Files are compared as the system does, through links. Only results may go into the .h5ad file
    of the counts, which keeps all that it has.
    """
    named = [(label, getattr(options, name, None)) for name, label in READ.items()]
    read = [(label, Path(path)) for label, path in named if path and os.path.exists(path)]
    written = [
        (label, path)
        for name, label in WRITTEN.items()
        for path in files_of(getattr(options, name, None))
    ]
    for (label, path), (other, target) in [
        *((one, two) for one in read for two in written),
        *combinations(written, 2),
    ]:
        if _is_same(path, target) and not (label == "COUNTS" and _goes_into(options)):
            raise ValueError(
                f"{other} would overwrite {label}, {path}. Give it a name of its own"
                f"{'' if (label, other) != ('COUNTS', '--out') else _INTO}."
            )


_INTO = "; results can go into COUNTS where it is an .h5ad file, without --transpose"


def files_of(path: str | None) -> list[Path]:
    """Return the files that an option of this value makes a command write."""
    if path is None:
        return []
    return list(_csv_files(path).values()) if _kind(path) == ".csv" else [Path(path)]


def _is_same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def _goes_into(options: argparse.Namespace) -> bool:
    """Whether the results of a fit go into the file of its counts."""
    if not hasattr(options, "save_model") or options.transpose:
        return False
    counts, out = Path(options.counts), Path(options.out)
    return _kind(counts) == _kind(out) in STORES and _is_same(counts, out)


def _kind(path: str | Path) -> str:
    """The ending that says how results are written; that of CSV for a folder of none."""
    if is_zarr(path):
        return ".zarr"
    is_folder = str(path).endswith(("/", os.sep)) or os.path.isdir(path)
    return ".csv" if is_folder else Path(path).suffix


def check_results_path(options: argparse.Namespace) -> None:
    """Raise an error if results cannot be written where --out says, before a fit takes its time."""
    kind = _kind(options.out)
    if Path(options.out).suffix == ".zarr" and not _goes_into(options):
        raise ValueError(
            f"--out cannot be a .zarr store other than COUNTS; give .h5ad, or {options.counts} "
            "where that is a store."
        )
    if kind not in ENDINGS and not _goes_into(options):
        raise ValueError(
            f"--out must end in {' or '.join(ENDINGS)}, or in / for a folder of CSV files; got "
            f"{Path(options.out).name}."
        )
    for path in files_of(options.out) if kind != ".zarr" else ():
        new = path.parent == Path(options.out) and not path.parent.exists()
        one = path.parent if new else path  # a folder that is to be made
        check_output_path("--out", one, (one.suffix,))
    if kind in STORES:
        import_anndata()
    if kind == ".h5ad" and _goes_into(options):
        with import_h5py().File(options.out, "r") as file:
            _check_layout(options.out, file)


def write_results(
    options: argparse.Namespace, model: PNMF, table: CountTable
) -> tuple[list[Path], list[str]]:
    """Write factors, their uncertainty, loadings, settings and history of a fit where --out says.

    Returns
    -------
    written : list of Path
        Files of the results.
    left_out : list of str
        Annotation of the counts that cannot be written.
    """
    path, kind = Path(options.out), _kind(options.out)
    keys = AnnDataKeys(options.layer, options.spatial_key, options.batch_key)
    samples, features = table.sample_names, table.feature_names
    if kind == ".csv":
        return _write_csv(options.out, model, samples, features), []
    left_out: list[str] = []
    if kind == ".npz":
        names = {"sample_names": samples, "feature_names": features}
        named = {key: np.asarray(value, dtype=str) for key, value in names.items() if value}
        write_archive(path, {"settings": settings(model)}, results(model) | named)
    elif kind == ".zarr":
        write_fit(path, keys, model, table.annotation and table.annotation.obsm)
    elif _goes_into(options):
        _write_into(path, _bare(keys, model, table))
    else:
        adata, left_out = _annotated(keys, model, table)
        image = _image(adata)
        with replacing(path) as part:
            part.write_bytes(image)
    return [path], left_out


def _csv_files(path: str | Path) -> dict[str, Path]:
    """Files of CSV results: those in a folder, or beside NAME.csv as NAME_factors.csv and so on."""
    path, is_file = Path(path), Path(path).suffix == ".csv" and not os.path.isdir(path)
    folder, start = (path.parent, f"{path.stem}_") if is_file else (path, "")
    files = {name: folder / f"{start}{name}.csv" for name in (*TABLES, *OPTIONAL)}
    return {**files, "settings": folder / f"{start}settings.json"}


def _write_csv(
    path: str, model: PNMF, samples: Sequence[str] | None, features: Sequence[str] | None
) -> list[Path]:
    """Write the files, remove those that only an earlier fit had, and return what is written."""
    found, files = results(model), _csv_files(path)
    tables = {name: rows for name, rows in (TABLES | OPTIONAL).items() if name in found}
    unused = [files.pop(name) for name in OPTIONAL if name not in found]
    stale = unused if files["settings"].exists() else []  # without settings they are not ours
    names: Mapping[str, Sequence[str] | None] = {"sample": samples, "feature": features}
    components, heads = [f"component_{l}" for l in range(model.n_components)], _heads(model)
    folder = files["settings"].parent
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with ExitStack() as stack:  # all are written before the first takes its place
            part = {name: stack.enter_context(replacing(file)) for name, file in files.items()}
            for name, rows in tables.items():
                values = found[name].reshape(len(found[name]), -1)
                head = [rows, *heads.get(name, components)]
                labels = names.get(rows) or range(len(values))
                lines = ([label, *row] for label, row in zip(labels, values.tolist(), strict=True))
                _write_lines(part[name], [head], lines)
            part["settings"].write_text(json.dumps(settings(model), indent=1), encoding="utf-8")
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
    for file in stale:
        file.unlink(missing_ok=True)
    return list(files.values())


def _heads(model: PNMF) -> dict[str, list[str]]:
    """Heads of the columns of those tables whose columns are not the components."""
    batches, covariates = (list(map(str, one or ())) for one in (model.batches_, model.covariates_))
    effects = zip(EFFECTS, (batches, batches, covariates, covariates), strict=True)
    return {"elbo_history": ["elbo"], "dispersion": ["dispersion"], **dict(effects)}


def _write_lines(path: Path, *tables: Iterable[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        for lines in tables:
            csv.writer(file, lineterminator="\n").writerows(lines)


def _bare(keys: AnnDataKeys, model: PNMF, table: CountTable) -> AnnData:
    """Results with the names of samples and features alone."""
    adata = import_anndata().AnnData(shape=table.X.shape)
    adata.obs_names = table.sample_names or adata.obs_names
    adata.var_names = table.feature_names or adata.var_names
    return keys.write(adata, model)


def _annotated(keys: AnnDataKeys, model: PNMF, table: CountTable) -> tuple[AnnData, list[str]]:
    """Results with the annotation of samples and features, and what of it cannot be written."""
    if table.annotation is None:
        adata = _bare(keys, model, table)
        if table.coordinates is not None:
            adata.obsm["spatial"] = table.coordinates
        return adata, []
    AnnData, adata = import_anndata().AnnData, table.annotation.copy()
    left_out: list[str] = []
    try:
        _image(adata)
    except Exception:  # anndata refuses in many ways what it has read
        for axis in ("obs", "var"):
            frame = getattr(adata, axis)
            odd = [
                c for c in dict.fromkeys(frame) if not _is_writable(AnnData(**{axis: frame[[c]]}))
            ]
            left_out += [f"{axis}[{column!r}]" for column in odd]
            setattr(adata, axis, frame.drop(columns=odd))
        for part in ("obsm", "uns"):
            held = getattr(adata, part)
            for key in list(held):
                if not _is_writable(AnnData(shape=adata.shape, **{part: {key: held[key]}})):
                    left_out.append(f"{part}[{key!r}]")
                    del held[key]
    return keys.write(adata, model), left_out


def _is_writable(adata: AnnData) -> bool:
    try:
        _image(adata)
    except Exception:
        return False
    return True


def _image(adata: AnnData) -> bytes:
    """The bytes of an .h5ad file, made in memory: HDF5 does not survive a disk that is full."""
    with import_h5py().File("results", "w", driver="core", backing_store=False) as file:
        _anndata_io().write_elem(file, "/", adata)
        file.flush()
        return file.id.get_file_image()


def _anndata_io() -> ModuleType:
    """What reads and writes parts of files of anndata; before 0.11 it was experimental."""
    anndata = import_anndata()
    return anndata.io if hasattr(anndata, "io") else anndata.experimental


def _write_into(path: Path, found: AnnData) -> None:
    """Add results to an .h5ad file, which keeps all else, also what anndata cannot read."""
    File, image = import_h5py().File, _image(found)
    with replacing(path) as part:
        shutil.copyfile(path, part)
        _reserve(part, 2 * len(image))
        with File(io.BytesIO(image), "r") as new, File(part, "r+") as file:
            _check_layout(path, file, new)
            for name in ("obsm", "varm", "uns"):
                group = file.require_group(name)
                group.attrs.update(new[name].attrs)
                for key in STALE if name == "varm" else ():
                    group.pop(key, None)
                for key in new[name]:
                    group.pop(key, None)
                    new.copy(new[name][key], group, key)
            for axis, columns in COLUMNS.items():
                _replace_columns(file[axis], new[axis], {f"pnmf_{name}" for name in columns})


def _reserve(path: Path, size: int) -> None:
    """Make room for HDF5, which crashes on a disk that is full; an OSError if there is none."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), path.stat().st_size, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # other systems of files cannot reserve


def _check_layout(path: str | Path, file: Any, new: Any = None) -> None:
    """Raise a ValueError if results cannot be added to an open file, or are of other samples."""
    Group = import_h5py().Group
    known = [file[name] for name in ("obs", "var", "obsm", "varm", "uns") if name in file]
    if not all(isinstance(one, Group) for one in known) or not {"obs", "var"} <= set(file):
        raise ValueError(
            f"{path} has the layout of an old anndata, to which results cannot be added. Give "
            "--out another name, or write the file anew with anndata."
        )
    for axis in ("obs", "var") if new is not None else ():
        frames = [one[axis] for one in (file, new)]
        held, names = (_anndata_io().read_elem(one[one.attrs["_index"]]) for one in frames)
        if list(held) != list(names):
            raise ValueError(f"{path} has changed since it was read: its {axis}_names are others.")


def _replace_columns(frame: Any, new: Any, stale: set[str]) -> None:
    """Set the columns of a table that results bring, and remove those of results before."""
    order = [str(column) for column in frame.attrs["column-order"]]
    for column in {*new.attrs["column-order"], *stale} & set(order):
        del frame[column]
        order.remove(column)
    for column in new.attrs["column-order"]:
        new.file.copy(new[column], frame, column)
        order.append(column)
    frame.attrs.create("column-order", order, dtype=import_h5py().string_dtype())
