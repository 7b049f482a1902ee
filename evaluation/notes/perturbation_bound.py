# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Draw the perturbation bound of one merge, into the PNG beside this file."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

weight = np.linspace(0, 1, 101)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(weight, 1 / (1 + weight), color="tab:blue")
axes.axhline(1, color="tab:gray", linestyle="--", linewidth=1)
axes.text(1.03, 1.01, "evicted: the survivor stands for it as it is", ha="right", va="bottom", color="tab:gray")
for w in (0.4, 0.7, 1.0):
    axes.plot(w, 1 / (1 + w), "o", color="tab:blue")
    axes.annotate(f"{1 / (1 + w):.0%}", (w, 1 / (1 + w)), (0, -14), textcoords="offset points", ha="center")
axes.set(xlim=(0, 1.06), ylim=(0.4, 1.1))
axes.set_xlabel("weight $w_i$ of the merge: cosine similarity, times the share of the norm")
axes.set_ylabel("$|v_i - v'_j|\\ /\\ |v_i - v_j|$")
axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
