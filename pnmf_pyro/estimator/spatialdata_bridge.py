"""SpatialData in: one of its tables, which receives the results, and where its rows are."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pnmf_pyro.estimator.anndata_bridge import ANNOTATION, annotated_regions
from pnmf_pyro.estimator.results import SPATIAL_KEY

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData
    from typing_extensions import TypeIs

# The coordinate system that elements have unless another is named.
USUAL_SYSTEM = "global"


def is_spatialdata(thing: object) -> TypeIs[SpatialData]:
    """Say whether something is a SpatialData object, without importing spatialdata."""
    spatialdata = sys.modules.get("spatialdata")
    return spatialdata is not None and isinstance(thing, spatialdata.SpatialData)


def table_of(sdata: SpatialData, name: str | None, places: bool) -> AnnData:
    """Return a table of a SpatialData object.

    Parameters
    ----------
    sdata : SpatialData
        Its elements are read, never changed.
    name : str or None
        Name of the table; None for the only one.
    places : bool
        Give the table obsm["spatial"] where it has none: the centroids of the elements that its
        rows are of.
    """
    names = list(sdata.tables)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        got = "none was named" if name is None else f"got {name!r}"
        raise ValueError(f"table must name a table of the SpatialData object, of {names}; {got}.")
    table = sdata.tables[name]
    if places and SPATIAL_KEY not in table.obsm and ANNOTATION in table.uns:
        table.obsm[SPATIAL_KEY] = centroids(sdata, table)
    return table


def centroids(sdata: SpatialData, table: AnnData) -> np.ndarray:
    """Return the centroid of the shape, point or label of each row of a table, (N, p).

    They are in the coordinate system `global`, or in the only one that all elements have.
    """
    spatialdata = import_module("spatialdata")
    keys, regions = table.uns[ANNOTATION], annotated_regions(table)
    if missing := [region for region in regions if region not in sdata]:
        raise ValueError(
            f"the table is of {missing[0]!r}, which is no element of the SpatialData object. Put "
            f"coordinates into obsm[{SPATIAL_KEY!r}], or pass spatial_key=None."
        )
    system = _common_system([sdata[region] for region in regions])
    of_row = table.obs[keys["region_key"]].to_numpy()
    instances = table.obs[keys["instance_key"]].to_numpy()
    found: Any = None
    for region in regions:
        mine = of_row == region
        frame = spatialdata.get_centroids(sdata[region], coordinate_system=system).compute()
        if unknown := instances[mine][~np.isin(instances[mine], frame.index)].tolist():
            raise ValueError(
                f"{len(unknown)} rows of the table, such as {unknown[0]!r}, are not in the element "
                f"{region!r}. Leave them out of the table."
            )
        found = np.full((len(table), frame.shape[1]), np.nan) if found is None else found
        found[mine] = frame.loc[instances[mine]].to_numpy()
    return found


def _common_system(elements: list[Any]) -> str:
    transformations = import_module("spatialdata.transformations")
    each = [set(transformations.get_transformation(one, get_all=True)) for one in elements]
    common = set.intersection(*each)
    if USUAL_SYSTEM in common:
        return USUAL_SYSTEM
    if len(common) == 1:
        return common.pop()
    raise ValueError(
        f"the elements of the table have the coordinate systems {sorted(common)} in common, and "
        f"one is needed. Put coordinates into obsm[{SPATIAL_KEY!r}] of the table."
    )
