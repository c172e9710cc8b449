"""One colour and one marker for each method, the same in every figure, told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INK = "#222222"
MUTED = "#8A8A8A"
GRID = "#E4E4E4"
PAPER = "#FFFFFF"


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    dark: str
    """the colour on a dark page"""
    marker: str


# one family of hues for each feature map, light to dark with its size
LOOKS = {
    "Softmax": Look(INK, "#EDEDED", "o"),
    "Linear": Look("#009E73", "#2FC79C", "s"),
    "FAVOR+ (64)": Look("#F2C14E", "#F2C14E", "v"),
    "FAVOR+ (128)": Look("#E08214", "#EB9A3C", "<"),
    "FAVOR+ (512)": Look("#A6460A", "#CF6A2B", ">"),
    "DPFP-1": Look("#6CB8EA", "#8CCBF3", "o"),
    "DPFP-2": Look("#2878B5", "#4A9FE0", "D"),
    "DPFP-3": Look("#143C7A", "#6F8FE6", "^"),
    "DPFP-1 delta": Look("#E63B1F", "#FF6347", "D"),
    "DPFP-2 delta": Look("#5B1E3A", "#D9759F", "^"),
    "Linear delta": Look("#8CCB6B", "#9FDB7F", "s"),
    "Schlag (2021)": Look("#532875", "#A985DB", "P"),
    "Schlag (2021) with DPFP-1": Look("#BC3FD6", "#DE7DF2", "X"),
    "FAVOR+ (64) delta": Look("#E9C84A", "#F1D667", "v"),
    "FAVOR+ (128) delta": Look("#653A1B", "#BF8A60", "<"),
    # the family beyond the paper
    "FWP (1991)": Look("#7F0D3F", "#EC5195", "H"),
    "FWP (1991) linear": Look("#0B0776", "#5651EC", "H"),
    "Decay (2016)": Look("#4BDBB0", "#7EE5C6", "d"),
    "Gated (2021)": Look("#7B0009", "#EC515C", "p"),
    "ReLU": Look("#2218E9", "#5A52EC", "h"),
    "Exp": Look("#C30B01", "#EC5951", "*"),
    "Softmax features": Look("#1071DD", "#519AEC", "p"),
    "Hedgehog": Look("#314274", "#778BC5", "P"),
    "DPFP-1 gated delta": Look("#497B8B", "#80AEBC", "h"),
    "DPFP-1 delta product": Look("#E3CC0A", "#ECDB51", "*"),
    "DPFP-1 delta l2": Look("#73AEDA", "#A3CAE7", "s"),
    "SiLU delta": Look("#AB6456", "#BF897F", ">"),
    "SiLU gated delta": Look("#B9D378", "#D1E2A6", "<"),
    "Delta RNN": Look("#1F417A", "#7F9FD6", "v"),
    "Recurrent Delta Net": Look("#9F00FF", "#C46BFF", "^"),
}
# Figure 3 names the rule of what Figure 2 calls DPFP-1; a map keeps its look under another rule
LOOKS |= {"DPFP-1 sum": LOOKS["DPFP-1"]}
LOOKS |= {f"{name} delta": LOOKS[name] for name in ("ReLU", "Softmax features", "Hedgehog")}
LOOKS |= {f"{name} sum": LOOKS[name] for name in ("FAVOR+ (64)", "ReLU", "Exp", "Softmax features", "Hedgehog")}

# for methods that the paper does not have, in the order of the experiment file
SPARE = (
    Look("#00798C", "#35B5C9", "h"),
    Look("#D1495B", "#E57A89", "p"),
    Look("#7A7D00", "#B9BC3A", "*"),
    Look("#3D5A80", "#7C9CC6", "d"),
)

DARK = {
    INK: "#E4E6E8",
    MUTED: "#8E959C",
    GRID: "#2E343A",
    PAPER: "#171B1F",
} | {look.colour: look.dark for look in (*LOOKS.values(), *SPARE) if look.colour != INK}


def looks_of(rows: Sequence[str]) -> dict[str, Look]:
    """The look of each row; rows unknown to the paper take the spare ones in turn."""
    strangers = [row for row in rows if row not in LOOKS]
    return {row: LOOKS.get(row) or SPARE[strangers.index(row) % len(SPARE)] for row in rows}
