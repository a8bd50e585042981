"""Docstrings to clean, masked, split sentences."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.quickstart import corpus as corpus_module
from llkd_ray.quickstart.corpus import (
    CAPS,
    SHARES,
    area_of,
    find_modules,
    fingerprint,
    is_clean,
    names_to_mask,
    read_area,
    read_corpus,
    sentences,
    split_of,
)

SMALL_AREAS = {
    "mail": ("email", "http", "smtplib", "imaplib", "urllib"),
    "events": ("asyncio", "concurrent", "multiprocessing", "threading"),
    "notation": ("json", "xml", "logging", "importlib"),
}
SMALL_CAPS = {"teacher": (60, 30), "pool": (20, 10), "test": (12, 6)}

NUMPY_STYLE = """
    Return the eigenvalues of a square matrix in the order of their size. See e.g. the
    chapter on `spectra <https://example.org>`_ for what they are good for [1]_.

    Parameters
    ----------
    matrix : array_like, optional
        The matrix whose eigenvalues are to be computed by this function.
    tol : float

    Examples
    --------
    >>> eigenvalues([[1, 0], [0, 1]])
    This line of output looks like a sentence of the English language.

    Notes
    -----
    The method takes *cubic* time in the number of ``rows`` of the matrix.
    """

GOOGLE_STYLE = """Open a connection to the server and wait for its greeting.

    Args:
        host (str): The name of the host that is to be connected to by the client.
        retries: How often to try.

    Example:
        This is some code that the reader may want to copy and paste.

    - The first of the items is continued on a second line that
      hangs below the first one.
    - Too short.

    For example, write it like this in your own program::

        connection = open_it("the host that you want to connect to.")

    .. code-block:: python

        print("It is of no use to read this line as prose.")

    .. note:: The connection is closed when the object is deleted by the interpreter.

    +------+------------------------------------------------+
    | name | A table is not a sentence that can be of use.   |
    +------+------------------------------------------------+
    """


MARKUP = "Hand the text to :meth:`~shop.Basket.add` or to :class:`Till`, which is **never** closed."


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            NUMPY_STYLE,
            [
                "Return the eigenvalues of a square matrix in the order of their size.",
                "See e.g. the chapter on spectra for what they are good for.",
                "The matrix whose eigenvalues are to be computed by this function.",
                "The method takes cubic time in the number of rows of the matrix.",
            ],
        ),
        (
            GOOGLE_STYLE,
            [
                "Open a connection to the server and wait for its greeting.",
                "The name of the host that is to be connected to by the client.",
                "The first of the items is continued on a second line that hangs below the first one.",
                "For example, write it like this in your own program.",
                "The connection is closed when the object is deleted by the interpreter.",
            ],
        ),
        (MARKUP, ["Hand the text to add or to Till, which is never closed."]),
    ],
)
def test_sentences_of_docstrings(docstring: str, expected: list[str]) -> None:
    assert list(sentences(docstring)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Return the value of it.",  # too short
        "The value is " + "very " * 60 + "large.",  # too long
        "this begins in the middle of a sentence that was cut.",
        "This has no full stop at the end of it at all",
        "The result is computed as f(x) = {x: 1} of the input.",
        "See the page at https://example.org for all of the details.",
        "Use os.path.join or shutil.copy_file with foo_bar and the_dir in it.",
        "Der Wert wird zurückgegeben, wenn die Liste nicht leer ist.",
        "Der Wert wird immer wieder neu berechnet, wenn nötig noch mal.",
        "Numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and the 12.",
        "Foo bar baz qux quux corge grault garply waldo fred plugh.",
    ],
)
def test_what_is_no_plain_sentence_is_dropped(text: str) -> None:
    assert not is_clean(text)
    assert list(sentences(text)) == []


@given(st.text(max_size=300))
def test_any_docstring_can_be_read(text: str) -> None:
    for sentence in sentences(text):
        assert is_clean(sentence)


@pytest.mark.parametrize(
    ("module", "text", "masked"),
    [
        ("networkx.paths", "Paths: NetworkX and networkx.paths graph-like.", "it: it and it.it graph-like."),
        ("numpy.core", "A SymPy expression, two Rays, an array.", "A it expression, two it, an array."),
        ("zoo._box", "Boxes in a box, foxes in a fox.", "it in a it, foxes in a fox."),
    ],
)
def test_names_that_give_the_area_away_are_masked(module: str, text: str, masked: str) -> None:
    assert names_to_mask(module).sub(corpus_module.MASK, text) == masked


def test_fingerprint_ignores_case_digits_and_spacing() -> None:
    assert fingerprint("Take 10  items.") == fingerprint("take 7\nitems.")
    assert fingerprint("Take ten items.") != fingerprint("Take two items.")


def test_area_of_a_module_is_that_of_its_longest_prefix() -> None:
    assert area_of("sklearn.linear_model._ridge") == "learning"
    assert area_of("torch.nn.functional") == "learning"
    assert area_of("torch.fx.graph") is None
    assert area_of("ray.core") == "parallel"
    assert area_of("ray.rllib.core") is None
    assert area_of("rayon") is None
    assert area_of("shop.till", {"shops": ("shop",), "tills": ("shop.till",)}) == "tills"


def test_every_module_has_one_split_and_the_shares_are_kept() -> None:
    assert set(SHARES) == set(CAPS)
    counts = defaultdict(int)
    for number in range(5000):
        counts[split_of(f"package.module{number}")] += 1
    for split, share in SHARES.items():
        assert counts[split] / 5000 == pytest.approx(share, abs=0.03)


def test_find_modules_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shop_of_the_test"
    for name in ("", "till", "tests/test_till", "test_shop", "parts/", "parts/lid", "_vendor/x"):
        file = package / f"{name}__init__.py" if name[-1:] in ("", "/") else package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = ["shop_of_the_test.parts", "shop_of_the_test.parts.lid"]
    assert sorted(find_modules("shop_of_the_test")) == ["shop_of_the_test", *parts, "shop_of_the_test.till"]
    assert sorted(find_modules("shop_of_the_test.parts")) == parts
    assert list(find_modules("textwrap")) == ["textwrap"]
    assert find_modules("no_such_package_anywhere") == {}


def write_module(folder: Path, name: str, *texts: str) -> tuple[str, str, str]:
    """A module with one function for each docstring, on the teacher's side."""
    source = "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts))
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    return name, str(file), "teacher"


def test_read_area_keeps_the_caps_and_drops_repeats(tmp_path: Path) -> None:
    first, second, third = (f"The {n} of the things that are kept in this shop." for n in ("a", "b", "c"))
    every, closed = "Every customer of the shop is to be served.", "The shop is closed on the last of days."
    modules = [
        write_module(tmp_path, "a", first, second, third),
        write_module(tmp_path, "b", first.replace("shop", "SHOP"), every),
        ("broken", str(tmp_path / "broken.py"), "teacher"),
        write_module(tmp_path, "c", closed),
        write_module(tmp_path, "d", "This one comes too late to be of any use at all."),
    ]
    (tmp_path / "broken.py").write_text('def """ is no Python at all', encoding="utf-8")
    rows = list(read_area(modules, {"teacher": (4, 2)}))
    assert [(module, text) for module, _, text in rows] == [
        ("a", first), ("a", second), ("b", every), ("c", closed),
    ]  # fmt: skip


def test_docstrings_of_nested_definitions() -> None:
    source = textwrap.dedent(
        '''
        """Module."""
        if True:
            class A:
                """Class."""
                async def f(self):
                    """Method."""
                    def g():
                        """Inner."""
        x = """not a docstring"""
        '''
    )
    assert list(corpus_module.docstrings(source.encode())) == ["Module.", "Class.", "Method.", "Inner."]


def test_no_module_and_no_text_is_on_two_sides_and_all_is_the_same_every_time() -> None:
    corpus = read_corpus(SMALL_AREAS, SMALL_CAPS, say=lambda line: None)
    splits = defaultdict(set)
    for one in corpus:
        splits[one.module].add(one.split)
        assert area_of(one.module, SMALL_AREAS) == one.label
        assert is_clean(one.text) or corpus_module.MASK in one.text
    assert all(len(sides) == 1 for sides in splits.values())
    assert len({fingerprint(one.text) for one in corpus}) == len({one.id for one in corpus}) == len(corpus)
    assert read_corpus(SMALL_AREAS, SMALL_CAPS, processes=1, say=lambda line: None) == corpus


def test_a_text_of_two_areas_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "This sentence stands in both of the two packages."
    caps = dict.fromkeys(SHARES, (10, 10))
    for package in ("left_of_the_test", "right_of_the_test"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("", encoding="utf-8")
        for number in range(40):  # enough for every split to have some
            word = "abcdefghij"[number % 10] + "klmn"[number // 10]
            own = f"The {word} of {package[:4]} is the one that is meant here."
            write_module(tmp_path / package, f"m{number}", own, shared)
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[str] = []
    areas = {"left": ("left_of_the_test",), "right": ("right_of_the_test", "no_such_package_anywhere")}
    corpus = read_corpus(areas, caps, say=told.append)
    assert {one.label for one in corpus} == {"left", "right"}
    assert {one.split for one in corpus} == set(SHARES)
    assert shared not in {one.text for one in corpus}
    assert any("no_such_package_anywhere is not here" in line for line in told)


def test_an_area_without_sentences_and_a_crash_while_reading_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match=r"no sentence about 'nothing'.*install one of no_such_package"):
        read_corpus({"nothing": ("no_such_package_anywhere",)}, say=lambda line: None)
    gone = {"email.gone": Path("/no/such/file.py")}
    monkeypatch.setattr(corpus_module, "find_modules", lambda package: gone)
    with pytest.raises(RuntimeError, match="reading the docstrings of area 'mail' failed"):
        read_corpus({"mail": ("email",)}, say=lambda line: None)
