"""The pages of docs/: every labelled formula has a check, every reference and link a target.

The checks are in the neighbouring files, in float64 against automatic differentiation or brute
force; importing them fills CHECKED.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np

from . import (  # noqa: F401
    test_batch_norm_act_max_pool_math,
    test_batch_norm_math,
    test_batch_norm_statistics_math,
    test_conv_bn_act_math,
    test_residual_add_math,
)
from .formulas import (
    CHECKED,
    checks,
    random,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*DOCS.glob("math/*.md"), DOCS / "architecture.md"])

DEFINITION = re.compile(r"\\text\{\(([A-Z]\d+)\)\}")
REFERENCE = re.compile(r"\(([ABFPR]\d+)\)")


def test_every_label_isCHECKED() -> None:
    printed: list[str] = []
    for page in PAGES:
        printed += DEFINITION.findall(page.read_text(encoding="utf-8"))
    assert len(printed) == len(set(printed)), "a label is printed twice"
    assert set(printed) == set(CHECKED)


def test_every_reference_has_a_formula() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(REFERENCE.findall(text)) == set(DEFINITION.findall(text))


def test_links_between_pages() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            path = page if not target[0] else page.parent / target[0]
            assert path.is_file(), f"{page.name} links to {target[0]}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not target[1] or target[1][1:] in anchors, f"{page.name}: no {target[1]}"


@checks("A1", "A2")
def test_mask_addresses() -> None:
    n, c, spatial = 3, 5, 11
    bits = (random(n, c, spatial, seed=120) > 0).numpy()
    # channels-last: one run of bits in memory order
    in_memory = bits.transpose(0, 2, 1).reshape(-1)
    flat = np.packbits(in_memory, bitorder="little")
    assert flat.size == -(-n * c * spatial // 8)
    for e in range(in_memory.size):
        assert flat[e // 8] >> (e % 8) & 1 == in_memory[e]
    # contiguous: a byte boundary before every plane
    planes = np.concatenate([np.packbits(p, bitorder="little") for p in bits.reshape(-1, spatial)])
    assert planes.size == n * c * -(-spatial // 8)
    for i, j, k in itertools.product(range(n), range(c), range(spatial)):
        byte = (i * c + j) * -(-spatial // 8) + k // 8
        assert planes[byte] >> (k % 8) & 1 == bits[i, j, k]


def test_inline_math_survives_markdown() -> None:
    # Between single dollars a renderer may take a backslash before punctuation, or an asterisk, for
    # markdown; a fenced block is left alone.
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert prose.count("$") % 2 == 0, f"{page.name}: a dollar is missing"
        for formula in re.findall(r"\$([^$]+)\$", prose):
            assert not re.search(r"\\[^A-Za-z]|[*|]", formula), f"{page.name}: ${formula}$"
