"""Changes to files of models, drawn at random, and what a changed file may lead to."""

import io
import json
import struct
import warnings
import zipfile

import numpy as np

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors

VALUES = (
    *(None, True, False, 0, 1, -1, 10**9, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf")),
    *("", "word", [], [1], ["a", "b"], [[1, 2], [3]], {}, {"a": 1}, "x" * 10**4, "\u0000"),
)
SHAPES = (
    *("(10**13,)", "(1000000000000,)", "(1000000, 1000000)", "(-1,)", "(0,)", "()", "(2,)"),
    *("(1.5,)", "(" * 5000, "(True, 2)", "(18446744073709551616,)"),
)
NUMBERS = (np.nan, np.inf, -np.inf, -1.0, 1e30, 1e300, -1e30, 0.0)


def saved_models(folder):
    """Bytes of a model of each kind, and counts, places and groups to use it with."""
    random = np.random.default_rng(0)
    X = random.poisson(np.exp(random.normal(size=(24, 2))) @ random.gamma(1, 2, (2, 6))) + 1.0
    places, groups = random.uniform(size=(24, 2)), np.array(["a", "b"] * 12)
    how = {"n_components": 2, "max_iter": 6}
    made = {
        "plain": PNMF(random_state=0, **how).fit(X.astype("f4")),
        "natural": pnmf_pyro.fit(X, size_factors="total", **how),
        "groups": pnmf_pyro.fit(X, places, groups, **how),
        "local": pnmf_pyro.fit(X, places, local=True, K=5, **how),
    }
    found = {}
    for name, model in made.items():
        model.save(folder / "model.npz")
        found[name] = (folder / "model.npz").read_bytes()
    return found, X, places + 0.01, groups


def use(path, X, places, groups):
    """What a model computes; None where it is refused as it should be."""
    said, model = "", None
    try:
        model = PNMF.load(path)
    except ValueError as error:
        said = str(error)
    if model is None:
        assert path.name in said
        assert len(said.splitlines()) == 1
        return None
    where = ()
    if model.spatial:
        where = places[:5], None if model.groups_ is None else groups[:5]
    found = [
        model.transform(X[:5], *where),
        model.score(X[:5], None, *where),
        model.components_,
        get_factors(model),
        factor_uncertainty(model),
        factor_samples(model, 2, random_state=0),
        np.asarray(model.history_),
        model.elbo_,
    ]
    assert all(np.isfinite(one).all() for one in found)
    assert (model.components_ >= 0).all()
    assert len(model.get_feature_names_out()) == 2
    return model


# --- parts of a file


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(parts, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in parts:
                archive.writestr(name, content)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def raw(header, body=b""):
    return (
        b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header) + 1) + header.encode() + b"\n" + body
    )


def with_member(data, name, content):
    return zipped((members(data) | {f"{name}.npy": content}).items())


def with_header(data, change):
    header = json.loads(str(np.load(io.BytesIO(members(data)["header.npy"]))))
    return with_member(data, "header", npy(json.dumps(change(header))))


# --- changes, each drawn by a generator


def flipped_bits(data, random):
    changed = bytearray(data)
    for _ in range(int(random.choice([1, 2, 8, 64]))):
        changed[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def flipped_directory(data, random):
    changed, start = bytearray(data), data.find(b"PK\x01\x02")
    for _ in range(3):
        changed[int(random.integers(start, len(data)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def cut(data, random):
    start = int(random.integers(len(data)))
    return data[:start] + data[start + int(random.integers(1, len(data))) :]


def missing(data, random):
    parts = list(members(data).items())
    parts.pop(int(random.integers(len(parts))))
    return zipped(parts)


def twice(data, random):
    parts = list(members(data).items())
    return zipped([*parts, (parts[int(random.integers(len(parts)))][0], npy(np.ones(3)))])


def renamed(data, random):
    parts = list(members(data).items())
    i = int(random.integers(len(parts)))
    name = random.choice(["../../a.npy", "/tmp/a.npy", "header.npy", "history.npy", "a/b.npy"])
    parts[i] = (str(name), parts[i][1])
    return zipped(parts)


def shuffled(data, random):
    parts = members(data)
    order = random.permutation(len(parts))
    contents = list(parts.values())
    return zipped(zip(parts, (contents[i] for i in order), strict=True))


def compressed_otherwise(data, random):
    kinds = [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    return zipped(members(data).items(), kinds[int(random.integers(3))])


def other_shape(data, random):
    parts = members(data)
    name = str(random.choice(list(parts)))
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    kind = random.choice(["<f8", "<f4", "<i8", "<U400", "|S9", "O"])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
    return zipped((parts | {name: raw(text, parts[name][128:])}).items())


def other_type(data, random):
    parts = members(data)
    name = str(random.choice([name for name in parts if name != "header.npy"]))
    array = np.load(io.BytesIO(parts[name]))
    kind = random.choice(["f2", "f4", "i1", "u8", "c16", "?", "U9", "S9", "M8[s]", ">f8", "O"])
    return zipped((parts | {name: npy(array.astype(str(kind)))}).items())


def other_array(data, random):
    parts = members(data)
    name = str(random.choice([name for name in parts if name != "header.npy"]))
    array = np.load(io.BytesIO(parts[name]))
    changed = [array.T, array[..., None], array.ravel(), np.atleast_1d(array)[:0], np.zeros(())]
    return zipped((parts | {name: npy(changed[int(random.integers(len(changed)))])}).items())


def other_value(data, random):
    parts = members(data)
    name = str(random.choice([name for name in parts if name != "header.npy"]))
    array = np.load(io.BytesIO(parts[name]))
    flat = np.atleast_1d(array).copy()
    if flat.dtype.kind == "f":
        with np.errstate(over="ignore"):
            flat.flat[int(random.integers(flat.size))] = random.choice(NUMBERS)
    elif flat.dtype.kind == "i":
        flat.flat[int(random.integers(flat.size))] = random.choice([-1, 7, 2**31, 2**62])
    return zipped((parts | {name: npy(flat.reshape(array.shape))}).items())


def other_header(data, random):
    value = VALUES[int(random.integers(len(VALUES)))]
    return with_header(data, lambda header: header | {str(random.choice(list(header))): value})


def other_parameter(data, random):
    value = VALUES[int(random.integers(len(VALUES)))]

    def change(header):
        name = str(random.choice([*header["parameters"], "nonsense", "self", "__class__"]))
        return header | {"parameters": header["parameters"] | {name: value}}

    return with_header(data, change)


def other_kind(data, random):
    """Parameters of another kind of model than that of the arrays."""

    def change(header):
        p = header["parameters"]
        turned = [{name: not p[name]} for name in ("spatial", "local", "multigroup")]
        others = [{"training_mode": "standard"}, {"loadings_mode": "exp"}, {"n_components": 3}]
        others += [{"kernel": ["RBF", "Matern12"]}, {"K": 10**9}, {"num_inducing": 10**9}]
        others += [{"diagonal_only": True}, {"lengthscale": -1}, {"device": "cuda"}]
        choices = [*turned, *others]
        return header | {"parameters": p | choices[int(random.integers(len(choices)))]}

    return with_header(data, change)


CHANGES = (
    *(flipped_bits, flipped_directory, cut, missing, twice, renamed, shuffled),
    *(compressed_otherwise, other_shape, other_type, other_array, other_value),
    *(other_header, other_parameter, other_kind),
)
