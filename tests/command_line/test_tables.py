"""Tables of counts of many programs: what is read, what is said of it, and what is refused."""

import gzip
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pnmf_pyro.command_line import text_tables
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.tables import read_counts
from pnmf_pyro.command_line.text_form import TextForm

X = np.array([[5, 0, 2], [1, 7, 0]])
S, F = ["s1", "s2"], ["a", "b", "c"]
PLAIN = ",a,b,c\ns1,5,0,2\ns2,1,7,0\n"


def read(folder, text, name="t.csv", transpose=False, **form):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_counts(path, transpose=transpose, form=TextForm(**form))


def dense(table):
    return table.X.toarray() if sp.issparse(table.X) else table.X


@pytest.mark.parametrize(
    ("text", "samples", "features"),
    [
        (PLAIN, S, F),
        (PLAIN.encode("utf-8-sig"), S, F),
        (PLAIN.replace("\n", "\r\n"), S, F),
        (PLAIN.replace(",", ";"), S, F),
        (PLAIN.replace(",", "\t"), S, F),
        (PLAIN.replace(",", ";").replace("5", "5,0"), S, F),
        ("# made by hand\n\n# in spring\n" + PLAIN, S, F),
        ("# Constructed from biom file\n#OTU ID\ta\tb\tc\ns1\t5.0\t0.0\t2\ns2\t1\t7\t0\n", S, F),
        ("id,a,b,c,taxonomy\ns1,5,0,2,k; p\ns2,1,7,0,k; q\n", S, F),
        ("id,symbol,a,b,c\ns1,X,5,0,2\ns2,Y,1,7,0\n", S, F),
        ("plot,habitat,a,b,c\n14,wet,5,0,2\n8,dry,1,7,0\n", ["14", "8"], F),
        ("id,batch,a,b,c\ns1,NA,5,0,2\ns2,NA,1,7,0\n", S, F),
        ('"a" "b" "c"\n"s1" 5 0 2\n"s2"  1  7  0\n', S, F),
        ('"a"\t"b"\t"c"\n"1"\t5\t0\t2\n"2"\t1\t7\t0\n', ["1", "2"], F),
        (",a,b,c,\ns1,5,0,2,\ns2,1,7,0,\n", S, F),
        ("s1,5,0,2\ns2,1,7,0\n", S, None),
        ("a,b,c\n5,0,2\n1,7,0\n", None, F),
        ("5,0,2\n1,7,0\n", None, None),
        (",a,b,c\n0,5,0,2\n1,1,7,0\n", ["0", "1"], F),
        ("Unnamed: 0,a,b,c\n9,5,0,2\n4,1,7,0\n", ["9", "4"], F),
        (",Unnamed: 0,a,b,c\n0,0,5,0,2\n1,1,1,7,0\n", ["0", "1"], F),
        (",a,b,c\n10_1,5,0,2\n007,1,7,0\n", ["10_1", "007"], F),
        ("0,1,2\n5,0,2\n1,7,0\n", None, ["0", "1", "2"]),
        ("site,7157,672,1956\ns1,5,0,2\ns2,1,7,0\n", S, ["7157", "672", "1956"]),
        ('id,"a ""x""","b, c",d\n"s 1",5,0,2\ns2,1,7,0\n', ["s 1", "s2"], ['a "x"', "b, c", "d"]),
        (",a,a,\ns1,5,0,2\ns1,1,7,0\n", ["s1", "s1"], ["a", "a", "column 4"]),
    ],
)
@pytest.mark.filterwarnings("ignore:the samples have names of features")
def test_tables_of_text(text, samples, features, tmp_path):
    table = read(tmp_path, text)
    np.testing.assert_array_equal(table.X, X)
    assert (table.sample_names, table.feature_names) == (samples, features)


@pytest.mark.parametrize("name", ["t.tsv", "t.txt", "T.CSV", "t.csv.gz", "t.txt.gz", "t.tsv.gz"])
def test_endings_of_tables_of_text(name, tmp_path):
    text = PLAIN.encode()
    table = read(tmp_path, gzip.compress(text) if name.endswith("gz") else text, name)
    np.testing.assert_array_equal(table.X, X)
    assert table.feature_names == F


def test_numbers_that_count_are_names_and_it_is_said(tmp_path, capsys):
    text = "plot,a,b\n" + "".join(f"{i},{i % 3},{i * 7 % 5}\n" for i in range(1, 13))
    table = read(tmp_path, text)
    assert table.sample_names == [str(i) for i in range(1, 13)]
    assert table.feature_names == ["a", "b"]
    fit = ("fit", tmp_path / "t.csv", "--components", 1, "--set", "max_iter=2")
    run(*fit, "--out", tmp_path / "a.npz", "--set", "verbose=false")
    said = "took the first row for names of columns and column 'plot' (1, 2, 3, ...) for names of"
    assert f"pnmf-pyro: {said} rows\n" in capsys.readouterr().err
    run(*fit, "--out", tmp_path / "a.npz", "--quiet")
    assert "took" not in capsys.readouterr().err


def run(*arguments):
    return main([*map(str, arguments)])


# Tables that may be read in two ways, what decides, and what comes of each decision.
AMBIGUOUS = [
    ("plot,a\n101,5\n102,3\n109,0\n", "column 'plot' (101, 102, 109)", "both", "first-row", 1),
    ("year,a\n2001,5\n2001,3\n", "column 'year' (2001, 2001)", "both", "first-row", 1),
    ("first,a\n3,5\n4,0\n6,1\n7,1\n9,2\n", "column 'first' (3, 4, 6, ...)", "both", "first-row", 1),
    ("7157,672,1956\n5,0,2\n1,7,0\n", "first row (7157, 672, 1956)", "first-row", "none", 3),
    ("101,5,2\n102,0,3\n103,7,1\n", "column 1 (101, 102, 103)", "first-column", "none", 2),
]


@pytest.mark.parametrize(("text", "shown", "yes", "no", "n_features"), AMBIGUOUS)
def test_what_is_ambiguous_is_refused_with_the_option(text, shown, yes, no, n_features, tmp_path):
    with pytest.raises(ValueError, match="may be names") as refused:
        read(tmp_path, text)
    assert shown in str(refused.value)
    assert f"--names {yes}" in str(refused.value)
    assert "t.csv" in str(refused.value)
    n_lines = text.count("\n")
    named, counted = read(tmp_path, text, names=yes), read(tmp_path, text, names=no)
    assert named.X.shape[1] == n_features
    assert named.X.shape[0] == n_lines - (yes != "first-column")
    assert counted.X.size > named.X.size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",a,b\ns1,1,\ns2,0,4\n", "row 1 ('s1'), column 'b' is missing. Give it a number"),
        (",a,b\ns1,1,2\ns2,NA,4\n", "row 2 ('s2'), column 'a' is missing (NA)"),
        ("a,b\n1,2\n0,nan\n", "row 2, column 'b' is missing (nan)"),
        (",a,b\ns1,1,2\ns2,0\n", "row 2 ('s2'), column 'b' is missing"),
        (",a,b\ns1,1,2\ns2,0,4,5\n", "line 3 has 4 cells where 3 are expected"),
        (",a,b\ns1,1,x2\ns2,0,4\n", "row 1 ('s1'), column 'b' holds 'x2', which is no number"),
        (",a,b\ns1,1,1_0\ns2,0,4\n", "column 'b' holds '1_0'"),
        (",a,b\ns1,1,1e999\ns2,0,4\n", "row 1 ('s1'), column 'b' holds '"),
        (",a,grade,b\ns1,1,good,2\ns2,0,bad,4\n", "most of this column is no number"),
        (",a,b\ns1,1,-2\ns2,0,4\n", "row 1 ('s1'), column 2 ('b') holds -2"),
        ("Counts of 2020\n,a,b\ns1,1,2\ns2,0,4\n", "line 1 has 1 cells and the next one 3"),
        ("a,b\n", "it has no rows below the heading"),
        ("", "it is empty"),
        ("a,b\nx,y\nz,w\n", "it has no column of numbers"),
        (',a,b\ns1,1,2\n"s2,0,4\n', "quotation mark"),
        ("id,a\n" + "x" * 200_000 + ",1\n", "a quotation mark that is never closed"),
        ('id,a\ns1,"1,500"\ns2,"2,250"\n', "'1,500' may be thousands or decimals: give --decimal"),
        ("id;a;b\ns1;1,5;2\ns2;1.234;2\n", "name its sign with --decimal"),
        ("gene\tcell\tcount\ng1\tA\t3\ng1\tB\t1\ng2\tA\t4\n", "it is a long table"),
        ("id,g\xe9ne\na,1\n".encode("latin-1"), "save it as UTF-8"),
        (b"1,2\n\x00,3\n", "it is no text"),
    ],
)
def test_refusals_name_the_place_and_what_to_do(text, message, tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv cannot be read: ") as refused:
        read(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("always")
def test_options_of_tables_of_text(tmp_path, capsys):
    table = read(tmp_path, 'id|a|b\ns1|"1,500"|2\n', separator="|", decimal=",")
    np.testing.assert_array_equal(table.X, [[1.5, 2.0]])
    path = tmp_path / "t.csv"
    path.write_text("id|a|b\n1|5|2\n7|3|4\n4|0|1\n")
    fit = ("fit", path, "--out", tmp_path / "a.npz", "--components", 1, "--set", "max_iter=2")
    assert run(*fit, "--separator", "|", "--names", "both", "--quiet") in (0, 1)
    with np.load(tmp_path / "a.npz") as found:
        assert list(found["sample_names"]) == ["1", "7", "4"]
        assert list(found["feature_names"]) == ["a", "b"]
    path.write_text("5\t2\n3\t4\n0\t1\n")
    assert run(*fit, "--separator", "tab", "--no-names", "--quiet") in (0, 1)
    with pytest.raises(SystemExit):
        run(*fit, "--separator", "two")
    sp.save_npz(tmp_path / "t.npz", sp.csr_matrix(X))
    capsys.readouterr()
    assert run("fit", tmp_path / "t.npz", "--out", tmp_path / "a.npz", "--no-names") == 2
    assert "are for tables of text, and t.npz is none" in capsys.readouterr().err


def large(n, d, density):
    rng = np.random.default_rng(0)
    return rng.poisson(3.0, (n, d)) * (rng.random((n, d)) < density)


def test_pieces_are_one_table_and_know_their_rows(tmp_path, monkeypatch):
    counts = large(50, 9, 0.5) * np.where(np.arange(50) == 40, 100_000, 1)[:, None]
    frame = pd.DataFrame(counts, columns=[*"abcdefghi"]).rename(index="r{}".format)
    frame.to_csv(tmp_path / "t.csv")
    monkeypatch.setattr(text_tables, "PIECE", 70)
    monkeypatch.setattr(text_tables, "FEWEST_ROWS", 1)
    table = read_counts(tmp_path / "t.csv")
    np.testing.assert_array_equal(table.X, counts)
    assert table.X.dtype == np.float64
    assert table.sample_names == list(frame.index)
    frame = frame.astype(object)
    frame.iloc[44, 3] = "many"
    frame.to_csv(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"row 45 \('r44'\), column 'd' holds 'many'"):
        read_counts(tmp_path / "t.csv")


def test_large_tables_of_zeros_are_sparse_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "PIECE", 1 << 15)
    monkeypatch.setattr(text_tables, "LARGE", 1 << 15)
    n, d = 6000, 100
    counts = large(n, d, 0.05)
    pd.DataFrame(counts, columns=[f"g{j}" for j in range(d)]).to_csv(tmp_path / "t.csv")
    tracemalloc.start()
    table = read_counts(tmp_path / "t.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.X.format == "csr"
    np.testing.assert_array_equal(table.X.toarray(), counts)
    assert peak / (n * d) < 12  # one for each cell, and those of the first lines


@pytest.mark.parametrize(
    ("text", "turned"),
    [
        ("id,c1,c2\nENSG00000000003,5,0\nENSG00000000005.6,1,7\n", True),
        ("id,c1,c2\nENSMUSG00000000001,5,0\nENSMUSG00000000003,1,7\n", True),
        ("Geneid,c1,c2\nfoo,5,0\nbar,1,7\n", True),
        ("#OTU ID,c1,c2\nx1,5,0\nx2,1,7\n", True),
        ("id,ACGTACGTACGT-1,TTGTACGTACGA-1\nfoo,5,0\nbar,1,7\n", True),
        ("id,ENSG00000000003,ENSG00000000005\nACGTACGTACGT,5,0\nACTTACGTACGT,1,7\n", False),
        (PLAIN, False),
    ],
)
def test_features_in_rows_are_warned_of(text, turned, tmp_path, recwarn):
    read(tmp_path, text)
    assert [("--transpose" in str(one.message)) for one in recwarn] == [True] * turned
    recwarn.clear()
    read(tmp_path, text, transpose=True)
    ours = text.startswith("id,ENSG")
    assert [("--transpose" in str(one.message)) for one in recwarn] == [True] * ours


@pytest.mark.filterwarnings("always")
def test_coordinates_in_columns_of_a_table(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.poisson(3.0, (30, 4)), columns=[*"abcd"]).rename(index="s{}".format)
    frame["x"], frame["y"] = rng.normal(size=(2, 30))
    path, model = tmp_path / "t.csv", tmp_path / "m.npz"
    frame.abs().to_csv(path)
    fit = ("fit", path, "--components", 1, "--set", "max_iter=3", "--quiet")
    assert run(*fit, "--out", tmp_path / "a.npz") in (0, 1)
    assert "columns 'x' and 'y' are taken for features" in capsys.readouterr().err
    frame.to_csv(path)
    assert run(*fit, "--out", tmp_path / "a.npz", "--save-model", model, "--coords", "x,y") in (
        0,
        1,
    )
    assert "taken for features" not in capsys.readouterr().err
    with np.load(model) as found:
        assert [*found["feature_names"]] == [*"abcd"]
    table = read_counts(path, coords=("x", "y"))
    np.testing.assert_array_equal(table.coordinates, frame[["x", "y"]])
    np.testing.assert_array_equal(table.X, frame[[*"abcd"]])
    assert run("check", model, path, "--coords", "x,y", "--draws", 100, "--quiet") in (0, 1)
    assert run(*fit, "--out", tmp_path / "a.npz", "--coords", "x,z") == 2
    assert (
        "--coords must name columns, such as x,y; 'z' is there 0 times" in capsys.readouterr().err
    )


def test_missing_pandas_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pnmf-pyro\[tables\]"):
        read(tmp_path, PLAIN)
